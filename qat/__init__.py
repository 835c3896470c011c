"""Quantisation-aware training: the round trip of the format that ships, in a model's own linear layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantize.lazy import entrance

if TYPE_CHECKING:
    from qat.callback import QatCallback
    from qat.head import call_lm_head
    from qat.prepare import Prepared, prepare_qat, remove_qat
    from qat.shipping import Comparison, Shipped, compare_shipped, ship

__all__ = [
    "Comparison",
    "Prepared",
    "QatCallback",
    "Shipped",
    "call_lm_head",
    "compare_shipped",
    "prepare_qat",
    "remove_qat",
    "ship",
]

__getattr__, __dir__ = entrance(
    __name__,
    {
        "Comparison": "qat.shipping",
        "Prepared": "qat.prepare",
        "QatCallback": "qat.callback",
        "Shipped": "qat.shipping",
        "call_lm_head": "qat.head",
        "compare_shipped": "qat.shipping",
        "prepare_qat": "qat.prepare",
        "remove_qat": "qat.prepare",
        "ship": "qat.shipping",
    },
)
