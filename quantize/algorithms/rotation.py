"""Rotations merged into the weights, as in QuaRot (Ashkboos et al. 2024, arXiv 2404.00456) and SpinQuant (Liu et al.
2024, arXiv 2405.16406): outliers of the residual stream and of the values spread over all channels.

Only those that leave nothing to do at run time: R1, of the residual stream, and R2, of each head's values. They are
random Hadamard matrices, not learned ones; where a size is no power of 2, a Hadamard matrix times a small random
orthogonal one.

Shapes: `H` hidden size, `D` head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantize.algorithms.calibration import distance
from quantize.algorithms.structure import Norm, find_blocks, find_links, norm_offset, residual_writers, value_rows
from quantize.errors import UserError
from quantize.layers import untie

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Largest relative difference of the logits (`distance`): weights that are rounded once more, and other sums."""


@torch.no_grad()
def rotate_(model: Any, seed: int = 0) -> list[str]:
    """Rotates a plain model in place; it computes the same up to rounding.

    A tied lm_head gets weights of its own: the last norm's gain has to be folded into it, and not into the embedding.

    Returns:
        what was done, or why a rotation was left out.

    Raises:
        UserError: the rotated model computes something else, so this architecture is not known well enough.
    """
    probe = torch.randint(1, model.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(seed))
    probe = probe.to(model.get_input_embeddings().weight.device)
    before = model(input_ids=probe, use_cache=False).logits
    generator, notes = torch.Generator().manual_seed(seed), []
    reason = _no_residual_rotation(model)
    if reason is None:
        if model.config.tie_word_embeddings:
            notes.append("lm_head gets weights of its own, as the last norm is folded into it")
            untie(model)
        _rotate_residual(model, generator)
        notes.append("residual stream rotated")
    else:
        notes.append(f"residual stream not rotated: {reason}")
    rotated = sum(_rotate_values(block.self_attn, generator) for block in find_blocks(model)[1] if _attends(block))
    notes.append(f"values rotated in {rotated} blocks")
    apart = distance(before, model(input_ids=probe, use_cache=False).logits)
    if not apart <= _TOLERANCE.get(model.dtype, 1e-3):
        raise UserError(
            f"spinquant: a rotated {type(model).__name__} computes something else ({apart:.1%} apart), so this "
            "architecture cannot be rotated; leave spinquant out"
        )
    return notes


def hadamard(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix (size, size), float64, of even spread: signs x Hadamard (x) a small orthogonal one."""
    power = size & -size  # the largest power of 2 that divides it
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < power:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    odd = size // power
    small, _ = torch.linalg.qr(torch.randn(odd, odd, dtype=torch.float64, generator=generator))
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    return torch.kron(matrix / power**0.5, small.contiguous()) * signs[:, None]


def _no_residual_rotation(model: Any) -> str | None:
    """Why the residual stream of this model cannot be rotated; None = it can."""
    inner, head = model.base_model, model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or getattr(inner, "norm", None) is None:
        return "its last norm or its lm_head is not where it is expected"
    for block in find_blocks(model)[1]:
        if hasattr(block, "pre_feedforward_layernorm") or hasattr(block, "post_feedforward_layernorm"):
            return "its blocks norm what they add to it, channel by channel"
        if len(list(_residual_readers(block))) != 2:
            return "not all that reads it is a linear layer behind a norm"
        if not all(isinstance(writer, nn.Linear) for writer in residual_writers(block)):
            return "not all that writes to it is a linear layer"
    norms = [link.source for block in find_blocks(model)[1] for link in _residual_readers(block)]
    if any(getattr(norm.module, "bias", None) is not None for norm in norms if isinstance(norm, Norm)):
        return "its norms have biases"
    return None


def _residual_readers(block: nn.Module) -> Any:
    return (link for link in find_links(block) if isinstance(link.source, Norm))


def _attends(block: Any) -> bool:
    return getattr(block, "self_attn", None) is not None


def _rotate_residual(model: Any, generator: torch.Generator) -> None:
    embedding, head, inner = model.get_input_embeddings(), model.get_output_embeddings(), model.base_model
    rotation = hadamard(embedding.weight.shape[1], generator).to(embedding.weight.device)
    _fold(Norm(inner.norm, norm_offset(inner.norm)), (head,))
    _times(embedding.weight, rotation)
    _times(head.weight, rotation)
    for block in find_blocks(model)[1]:
        for link in _residual_readers(block):
            _fold(link.source, link.readers)
            for reader in link.readers:
                _times(reader.weight, rotation)
        for writer in residual_writers(block):
            _rotate_outputs(writer, 0, rotation)


def _fold(norm: Any, readers: tuple[Any, ...]) -> None:
    """Moves a norm's gain into what reads it."""
    gain = norm.gain
    for reader in readers:
        reader.weight.copy_((reader.weight.float() * gain).to(reader.weight.dtype))
    norm.set_gain(torch.ones_like(gain))


def _times(weight: Tensor, rotation: Tensor) -> None:
    """weight (O, H) @ rotation (H, H), in float64, in pieces: an embedding's copy would be four times its size."""
    for piece in weight.split(8192):
        piece.copy_((piece.double() @ rotation).to(weight.dtype))


def _rotate_outputs(linear: Any, start: int, rotation: Tensor) -> None:
    """Turns len(rotation) outputs of a layer, from `start` on: y -> y @ rotation."""
    rows = slice(start, start + rotation.shape[0])
    linear.weight[rows] = (rotation.t() @ linear.weight[rows].double()).to(linear.weight.dtype)
    if linear.bias is not None:
        linear.bias[rows] = (linear.bias[rows].double() @ rotation).to(linear.bias.dtype)


def _rotate_values(attention: Any, generator: torch.Generator) -> bool:
    """Turns each head's values, and what o_proj reads of them, back; False where its parts are not known."""
    values, output = value_rows(attention), getattr(attention, "o_proj", None)
    if values is None or not isinstance(output, nn.Linear):
        return False
    size = attention.head_dim
    rotation = hadamard(size, generator).to(output.weight.device)
    for start in range(values.start, values.stop, size):
        _rotate_outputs(values.linear, start, rotation)
    columns = output.weight.double().reshape(output.out_features, -1, size) @ rotation
    output.weight.copy_(columns.reshape(output.weight.shape).to(output.weight.dtype))
    return True
