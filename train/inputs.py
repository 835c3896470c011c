"""Everything about a run's input that can be told before something is loaded; all that is wrong is told at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from quantize.errors import UserError

if TYPE_CHECKING:
    from train.config import RunConfig


def check_inputs(config: RunConfig) -> None:
    """Settings, model, data and group size.

    Raises:
        UserError: one line for each thing that is wrong.
    """
    from train.config_checks import check_config
    from train.data import check_data_source
    from train.models import check_model_source

    checks: tuple[Callable[[], None], ...] = (
        lambda: check_config(config),
        lambda: check_model_source(config.model),
        lambda: check_data_source(config.data),
        lambda: _check_groups(config),
    )
    lines: list[str] = []
    for check in checks:
        try:
            check()
        except UserError as error:
            lines += error.lines
    if lines:
        raise UserError(*lines)


def _check_groups(config: RunConfig) -> None:
    """A group size that reaches too little; where the model's size cannot be told yet, `prepare_qat` finds it."""
    from train.model_size import UnknownSize, find_size
    from train.plan import coverage_obstacles

    try:
        size = find_size(config.model)
    except UnknownSize:
        return
    lines = list(coverage_obstacles(config, size))
    if lines:
        raise UserError(*lines)
