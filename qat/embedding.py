"""The input embedding under fake quantisation: a look-up of rounded rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qat.adapters import active_module
from qat.forwards import Binding
from qat.layer import LayerNumerics
from quantize.errors import UserError
from quantize.layers import plain_name
from quantize.numerics import Quantised


def find_embedding(model: nn.Module) -> tuple[str, nn.Embedding]:
    """(name, module) of the input embedding. A tied lm_head keeps its own numbers: the two part when they ship.

    Raises:
        UserError: it has an adapter, or computes more than a look-up.
    """
    embedding = active_module(model.get_input_embeddings())  # type: ignore[operator]
    if hasattr(embedding, "base_layer"):
        raise UserError("the input embedding has an adapter, which cannot go inside its fake quantiser; leave it out")
    (name,) = {plain_name(name) for name, module in model.named_modules() if module is embedding}
    if type(embedding).forward is not nn.Embedding.forward and not hasattr(embedding, "scalar_embed_scale"):
        raise UserError(
            f"{name}: a {type(embedding).__name__} computes more than a look-up, which its fake quantiser would leave "
            "out; choose a scheme that keeps the embedding in 16 bit"
        )
    return name, embedding


def binding_of_embedding(embedding: nn.Embedding, numerics: LayerNumerics) -> Binding:
    """A look-up of rounded rows."""

    def forward(self: Any, ids: Tensor) -> Tensor:
        scale = getattr(self, "scalar_embed_scale", None)  # Gemma multiplies what it looks up
        numerics.count()
        if self.weight.requires_grad:
            rows = nn.functional.embedding(ids, self.weight, self.padding_idx)
            output = rows + (_restored_rows(rows.detach(), numerics) - rows).detach()
        else:
            size = self.weight.numel() + self.weight.shape[0] * numerics.dtype.itemsize
            if numerics.cache.fits(numerics.name, size):
                (table,) = numerics.cache.get(
                    numerics.name, (self.weight,), None, lambda: [_whole(self.weight, numerics)]
                )
                assert isinstance(table, Quantised)
                found = Quantised(table.values[ids], table.scale[ids])
                output = numerics.numbers.restore(found, numerics.dtype).to(self.weight.dtype)
            else:
                output = _restored_rows(nn.functional.embedding(ids, self.weight, self.padding_idx), numerics)
        return output if scale is None else output * self.embed_scale.to(self.weight.dtype)

    return Binding(embedding, forward)


def _restored_rows(rows: Tensor, numerics: LayerNumerics) -> Tensor:
    """Rows (..., I) rounded: each has its scale, so that those that are looked up are all that needs rounding."""
    flat = rows.reshape(-1, rows.shape[-1])
    return numerics.numbers.restore(numerics.quantise(flat), numerics.dtype).to(rows.dtype).reshape(rows.shape)


@torch.no_grad()
def _whole(weight: Tensor, numerics: LayerNumerics) -> Quantised:
    parts = [numerics.quantise(rows) for rows in weight.split(8192)]  # a step's memory, not the table's in float32
    return Quantised(
        torch.cat([part.values.to(torch.int8) for part in parts]), torch.cat([part.scale for part in parts])
    )
