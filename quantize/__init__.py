"""Quantisation: the formats, their checkpoints, and what is measured of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantize.lazy import entrance

if TYPE_CHECKING:
    from quantize.errors import UserError
    from quantize.schemes import SCHEMES, Scheme, Target, find_scheme
    from quantize.storage import load_quantized

__all__ = [
    "SCHEMES",
    "Scheme",
    "Target",
    "UserError",
    "find_scheme",
    "load_quantized",
]

__getattr__, __dir__ = entrance(
    __name__,
    {
        "SCHEMES": "quantize.schemes",
        "Scheme": "quantize.schemes",
        "Target": "quantize.schemes",
        "UserError": "quantize.errors",
        "find_scheme": "quantize.schemes",
        "load_quantized": "quantize.storage",
    },
)
