"""Everything about a run's input that can be told before something is loaded; all that is wrong is told at once."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.errors import UserError
from quantize.task_files import task_name

if TYPE_CHECKING:
    from train.config import EvalConfig, RunConfig


def check_inputs(config: RunConfig) -> None:
    """Settings, model, data and group size.

    Raises:
        UserError: one line for each thing that is wrong.
    """
    from train.config_checks import find_problems

    problems = find_problems(config)
    bad = {key.partition(".")[0] for problem in problems for key in problem.keys}
    lines = [*(problem.text for problem in problems), *missing_inputs(config, bad)]
    if lines:
        raise UserError(*lines)


def missing_inputs(config: RunConfig, bad: Collection[str] = ()) -> list[str]:
    """What is wrong with the model, the data and the group size, one line each.

    Args:
        bad: sections (and `qat`) whose settings are known to be wrong; what depends on them is not looked at.
    """
    from train.data import check_data_source
    from train.models import check_model_source

    checks: tuple[tuple[set[str], Callable[[], None]], ...] = (
        ({"model"}, lambda: check_model_source(config.model)),
        ({"data"}, lambda: check_data_source(config.data, config.train.method)),
        ({"model", "quantize", "qat"}, lambda: _check_groups(config)),
        ({"eval"}, lambda: check_tasks(config.eval)),
        ({"eval", "quantize", "qat"}, lambda: check_engine(config)),
        ({"quantize"}, lambda: check_calibration(config.quantize.calibration)),
        (set(), lambda: _check_rewards(config)),
    )
    lines: list[str] = []
    for needed, check in checks:
        if needed.isdisjoint(bad):
            try:
                check()
            except UserError as error:
                lines += error.lines
    return lines


def check_tasks(settings: EvalConfig) -> None:
    """Tasks that lm-eval does not know; their data is loaded later, still before training."""
    if not settings.tasks:
        return
    from quantize.tasks import check_names, require_lm_eval

    require_lm_eval()
    check_names(settings.tasks)


def check_engine(config: RunConfig) -> None:
    """A vLLM that is not here, has no GPU to run on, or does not load the format; its reading is tried later."""
    if config.eval.engine != "vllm" or not config.eval.tasks:
        return
    from quantize.schemes import find_scheme
    from quantize.serving.engine import find_engine, refuse_unserved

    lines: list[str] = []
    if config.scheme_name is not None:
        scheme = find_scheme(config.scheme_name)
        try:
            refuse_unserved(scheme, scheme.eligible(config.quantize.target))
        except UserError as error:
            lines += error.lines
    try:
        find_engine(config.eval.engine)
    except UserError as error:
        lines += error.lines
    if lines:
        raise UserError(*lines)


def check_calibration(named: str | None) -> None:
    """A calibration file that is not there, or a task that lm-eval does not know."""
    if task := task_name(named):
        from quantize.tasks import check_names, require_lm_eval

        require_lm_eval()
        try:
            check_names([task])
        except UserError as error:
            raise UserError(*(line.replace("eval.tasks", "quantize.calibration") for line in error.lines)) from error
        return
    if named is not None and not Path(named).expanduser().is_file():
        raise UserError(
            f"quantize.calibration: there is no file {named}; give a .jsonl, .txt or .parquet file, or task:NAME"
        )


def _check_rewards(config: RunConfig) -> None:
    if config.train.method == "grpo":
        from quantize.rewards import load_rewards

        load_rewards(config.grpo.rewards)


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
