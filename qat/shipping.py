"""Ships what another trainer trained: from a prepared model to a folder of real torchao weights, and their comparison.

The command `train` does the same step by step, each in the run directory; here is the short way for a model in memory.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qat.merge import base_model_of, save_merged_weights
from qat.prepare import Prepared
from quantize.convert import convert_checkpoint, load_plain
from quantize.errors import UserError
from quantize.evaluate import Sample, batches
from quantize.grid import save_grid
from quantize.hardware import missing_for
from quantize.layers import Coverage
from quantize.storage import replacing


@dataclass(frozen=True)
class Shipped:
    """What `ship` wrote.

    Attributes:
        folder: the checkpoint, for plain `from_pretrained` and for `quantize.load_quantized`.
        coverage: which layers are quantised, and why not the others.
    """

    folder: Path
    coverage: Coverage


@dataclass(frozen=True)
class Comparison:
    """The trained function beside the shipped one, on the same batches.

    Attributes:
        largest_difference: of any two logits; 0.0 where all bits are equal.
        trained_loss, shipped_loss: nats a token.
    """

    largest_difference: float
    trained_loss: float
    shipped_loss: float

    @property
    def gap(self) -> float:
        """Trained minus shipped loss, nats a token."""
        return self.trained_loss - self.shipped_loss


@torch.no_grad()
def ship(
    prepared: Prepared,
    folder: Path | str,
    tokenizer: Any = None,
    *,
    merged: Path | str | None = None,
    trained_elsewhere: bool = False,
) -> Shipped:
    """Writes the quantised checkpoint of a trained model: the very integers and scales that were trained.

    Args:
        prepared: what `prepare_qat` gave; its model is read, not changed, and goes on training as before.
        folder: replaced as a whole when everything is on disk.
        tokenizer: saved beside the weights.
        trained_elsewhere: the weights were loaded after training, so that no layer need have run here.
        merged: keep W + s B A in 16 bit there too, which is written on the way: as a reference, and for other formats.

    Raises:
        UserError: no grid was trained (the adapter was outside, or a layer never ran), the adapter is not in use now,
            this machine lacks what the format's layout needs, or the disk is full.
    """
    chosen, model = prepared.format, prepared.model
    _refuse(prepared, trained_elsewhere)
    device = str(next(model.parameters()).device)
    with tempfile.TemporaryDirectory(prefix="ship-", dir=_beside(Path(folder))) as room:
        grid, plain = Path(room) / "grid", Path(room) / "merged"
        grid.mkdir()
        save_grid(grid, prepared.grid())
        source = plain if merged is None else Path(merged)
        _write_merged(model, source, chosen.dtype, tokenizer)
        coverage = convert_checkpoint(
            source,
            Path(folder),
            chosen.scheme,
            chosen.target,
            group_size=chosen.group_size,
            skip=chosen.skip,
            dtype=str(chosen.dtype).removeprefix("torch."),
            device=device,
            grid=grid,
            named=str(merged) if merged is not None else base_model_of(model).config.name_or_path or "model in memory",
        )
    return Shipped(Path(folder), coverage)


@torch.no_grad()
def compare_shipped(
    prepared: Prepared, folder: Path | str, texts: Sequence[str], tokenizer: Any, *, batch_size: int = 4
) -> Comparison:
    """Loads a shipped folder and runs it beside the trained model.

    On a CPU every bit is equal for the formats that the README calls so. On a GPU the training graph fuses what the
    plain one computes step by step (SiLU's exponential), so that last bits differ.

    Args:
        texts: each two tokens or longer.

    Raises:
        UserError: a text is shorter.
    """
    if not texts:
        raise UserError("a comparison needs a text")
    samples = [_sample(text, tokenizer) for text in texts]
    model = prepared.model
    device = str(next(model.parameters()).device)
    shipped = load_plain(
        Path(folder), device=device, attn_implementation=base_model_of(model).config._attn_implementation
    )
    training, worst, tokens, losses = model.training, 0.0, 0, [0.0, 0.0]
    model.eval()
    try:
        with prepared.trial():
            for _, ids, attention, mask in batches(samples, batch_size):
                ids, attention, wanted = ids.to(device), attention.to(device), mask.to(device)[:, 1:]
                pair = [
                    each(input_ids=ids, attention_mask=attention, use_cache=False).logits.float()
                    for each in (model, shipped)
                ]
                apart = float((pair[0] - pair[1])[attention.bool()].abs().max())
                worst = apart if math.isnan(apart) else max(apart, worst)  # once NaN, always: max keeps its first
                for place, logits in enumerate(pair):
                    found = torch.log_softmax(logits[:, :-1][wanted], -1)
                    losses[place] -= float(found.gather(-1, ids[:, 1:][wanted].unsqueeze(-1)).double().sum())
                tokens += int(wanted.sum())
    finally:
        model.train(training)
    return Comparison(worst, losses[0] / tokens, losses[1] / tokens)


def _refuse(prepared: Prepared, trained_elsewhere: bool) -> None:
    if prepared.placement != "inside":
        raise UserError(
            "the adapter was trained outside the fake quantiser, so that no grid was trained: nothing to ship"
        )
    if prepared.bindings and prepared.bindings[0].is_reference():
        raise UserError(
            "the adapter that was prepared is not in use; make it active first: model.set_adapter('default')"
        )
    scheme, target = prepared.format.scheme.name, prepared.format.target.name
    needed, given = prepared.format.target.dtype, str(prepared.format.dtype).removeprefix("torch.")
    if needed is not None and given != needed:
        raise UserError(
            f"{scheme} for {target} computes in {needed}, and was prepared for {given}: give prepare_qat "
            f"dtype=torch.{needed}, or load the model in it"
        )
    missing = missing_for(prepared.format.target)
    if missing:
        raise UserError(
            f"{scheme} for {target}: this machine lacks {'; '.join(missing)}; give prepare_qat another target, or ship "
            "where it is"
        )
    silent = prepared.silent()
    if silent and len(silent) < len(prepared.layers):
        from qat.callback import refusal

        raise UserError(refusal(silent))
    if silent and not trained_elsewhere:
        raise UserError(
            "no fake-quantised layer has run: the training went past all of them, and another function would ship; "
            "where the weights were trained elsewhere and loaded here, say ship(..., trained_elsewhere=True)"
        )


def _beside(folder: Path) -> Path:
    """The folder above, made where it is missing: a copy of the model may be too large for the temporary disk."""
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    return folder.absolute().parent


def _write_merged(model: Any, folder: Path, dtype: torch.dtype, tokenizer: Any) -> None:
    """A checkpoint of transformers with the merged weights."""
    base = base_model_of(model)
    if base.is_remote_code():
        raise UserError("the model brings code of its own, which only the command `train` ships along")
    config = copy.deepcopy(base.config)
    config.dtype, config.architectures = dtype, [type(base).__name__]
    if getattr(config, "use_cache", None) is False:
        config.use_cache = True  # trainers switch it off while they train
    with replacing(folder) as partial:
        save_merged_weights(model, partial, dtype)
        config.save_pretrained(partial)
        if base.can_generate():
            base.generation_config.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)


def _sample(text: str, tokenizer: Any) -> Sample:
    ids = tokenizer.encode(text)
    if len(ids) < 2:
        raise UserError(f"{text!r} has {len(ids)} tokens; a comparison needs two or more")
    return Sample(ids, [1] * len(ids))
