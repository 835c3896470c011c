"""The `train` command: parses, runs, and turns every outcome into an exit code.

0 = done; 2 = the user's input; 1 = our failure; 130 and 143 = stopped by Ctrl-C or SIGTERM with the state saved.
"""

from __future__ import annotations

import difflib
import errno
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantize.errors import Stopped, UserError

_FLAGS = ("--dry-run", "--debug", "--version", "--help")
_VALUES = ("--config", "--resume", "--sweep", "--trials")
_EXAMPLES = {"--config": "quickstart.yaml", "--resume": "runs/NAME", "--sweep": "tiny.yaml", "--trials": "20"}
# Loggers that warn, at each start, of what no user of this command can or need change.
_NOISY = ("torchao", "torch.utils._pytree", "bitsandbytes", "transformers.trainer_utils")
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_DESCRIPTION = """LoRA fine-tuning that keeps the weights on the quantisation grid they will ship on.

  train --config quickstart.yaml --qat int8-int4

  train --config sft_qwen3.yaml --qat int8-int4 --train.max_steps=100 --dry-run

  train --resume runs/NAME

  train --sweep configs/sweeps/tiny.yaml

Every key of the config is an option; dashes and underscores are alike. --lora=None is full fine-tuning. Keys of
model.shape and train.extra: --model.shape.KEY=VALUE, --train.extra.KEY=VALUE. Lists: a,b or ['a','b'].
With --config, --help shows that config's values as the defaults."""


@dataclass(frozen=True)
class CommandLine:
    """The command line, taken apart.

    Attributes:
        config: a path or the name of a packaged config.
        resume: the run to continue.
        sweep: the sweep file whose trials are to be run.
        trials: how many of them, as typed.
        flags: those given of --dry-run, --debug, --version, --help.
        overrides: all other words, for `load_config`.
        errors: what is wrong with the options above.
    """

    config: str | None = None
    resume: str | None = None
    flags: frozenset[str] = frozenset()
    overrides: tuple[str, ...] = ()
    errors: tuple[str, ...] = field(default=())
    sweep: str | None = None
    trials: str | None = None


def split_arguments(argv: Sequence[str]) -> CommandLine:
    """Separates the options of the command itself from those that override config keys."""
    words, values, flags = list(argv), dict[str, str](), set[str]()
    overrides, errors = list[str](), list[str]()
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        name = "--help" if name == "-h" else name.replace("_", "-") if "." not in name else name
        if name in _FLAGS:
            if equals and value.lower() not in ("true", "false"):
                errors.append(f"{word}: expected {name}, or {name}=True or False")
            elif value.lower() != "false":
                flags.add(name)
        elif name in _VALUES:
            if not equals:
                value = words.pop(0) if words and not words[0].startswith("--") else ""
            if not value:
                errors.append(f"{name} needs a value, as {name} {_EXAMPLES[name]}")
            elif values.get(name, value) != value:
                errors.append(f"{name} is given twice: {values[name]} and {value}")
            values[name] = value
        else:
            overrides.append(word)
    config, resume, sweep, trials = (values.get(name) for name in _VALUES)
    return CommandLine(config, resume, frozenset(flags), tuple(overrides), tuple(errors), sweep, trials)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    line = split_arguments(argv)
    try:
        return _run(line, list(argv))
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in line.flags:
            traceback.print_exc()
        return _report(error, debug="--debug" in line.flags)


def _report(error: BaseException, *, debug: bool) -> int:
    """Says what happened on stderr; returns the exit code."""
    if isinstance(error, BrokenPipeError):
        # Nobody reads on; Python's own flush at exit must not fail a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, UserError):
        lines, code = [f"error: {text}" for text in error.lines], 2
    elif isinstance(error, Stopped):
        lines, code = [f"stopped; continue with: {error.resume_command}"], 128 + error.signal_number
    elif isinstance(error, KeyboardInterrupt):
        lines, code = ["interrupted"], 130
    elif isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        where = f" ({error.filename})" if error.filename else ""
        lines, code = [f"error: {error.strerror}{where}; free some space, then continue with: train --resume RUN"], 2
    else:
        lines, code = [_failure(error, debug=debug)], 1
    print(*lines, sep="\n", file=sys.stderr)
    return code


def _run(line: CommandLine, argv: list[str]) -> int:
    if "--help" in line.flags:
        print_help(line)
        return 0
    if "--version" in line.flags:
        from importlib.metadata import version

        print(f"ongrid {version('ongrid')}")
        return 0
    errors = [*line.errors, *_misplaced(line)]
    if errors:
        raise UserError(*errors)
    if "--debug" not in line.flags:
        for name in _NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)
    if line.sweep:
        return _sweep(line, argv)
    return _resume(line, argv) if line.resume else _start(line, argv)


def _misplaced(line: CommandLine) -> Iterator[str]:
    """Options of the command itself that do not go together."""
    if line.config and line.resume:
        yield "--config and --resume exclude each other: a run is continued with its own config"
    if line.sweep and (line.config or line.resume):
        yield "--sweep takes its config from the `command:` of its file; leave --config and --resume out"
    if line.trials and not line.sweep:
        yield "--trials is the number of trials of --sweep"
    if line.trials and not (line.trials.isdecimal() and int(line.trials) > 0):
        yield f"--trials={line.trials}: expected a whole number >= 1"
    if not (line.config or line.resume or line.sweep or line.errors):
        yield _what_to_train(line.overrides)


def _what_to_train(words: Sequence[str]) -> str:
    """Where nothing says what to train; what was typed in its place is named."""
    text = "say what to train: --config FILE (as --config quickstart.yaml), --resume RUN or --sweep FILE; see --help"
    for word in words:
        near = difflib.get_close_matches(word.partition("=")[0], _VALUES, n=1)
        if near:
            return f"{word}: did you mean {near[0]}? {text}"
        if not word.startswith("-") and word.endswith((".yaml", ".yml")):
            return f"{word}: did you mean --config {word}? {text}"
    return text


def _sweep(line: CommandLine, argv: list[str]) -> int:
    from train.sweep import plan_sweep, render_sweep, run_sweep

    assert line.sweep is not None
    plan = plan_sweep(line.sweep, line.overrides, int(line.trials) if line.trials else None)
    if "--dry-run" in line.flags:
        text, obstacles = render_sweep(plan)
        print(text, flush=True)
        if obstacles:
            raise UserError(*obstacles)
        return 0
    run_sweep(plan, argv=argv, debug="--debug" in line.flags)
    return 0


def _start(line: CommandLine, argv: list[str]) -> int:
    from train.config_loading import load_config

    assert line.config is not None
    config = load_config(line.config, line.overrides, with_inputs=True)
    if "--dry-run" in line.flags:
        return _print_plan(config)
    from train.pipeline import run

    run(config, argv=argv)
    return 0


def _resume(line: CommandLine, argv: list[str]) -> int:
    from train.config import RunConfig
    from train.config_values import parse_options

    assert line.resume is not None
    options, errors = parse_options(RunConfig, line.overrides)
    if errors:
        raise UserError(*errors)
    roots = [str(option.value) for option in options if option.path == ("run", "root")]
    others = [option.option for option in options if option.path != ("run", "root")]
    root = roots[-1] if roots else "runs"
    if "--dry-run" in line.flags:
        return _print_resume_plan(line.resume, root, others)
    from train.pipeline import resume

    resume(line.resume, others, argv=argv, root=root)
    return 0


def _print_plan(config: Any) -> int:
    import yaml

    from train.config import resolved_dict
    from train.plan import estimate, render

    print(yaml.safe_dump(resolved_dict(config), sort_keys=False, allow_unicode=True))
    plan = estimate(config)
    print(render(plan, config), flush=True)
    if plan.obstacles:
        raise UserError(*plan.obstacles)
    return 0


def _print_resume_plan(run: str, root: str, others: Sequence[str]) -> int:
    """The plan of a run that was begun, and which of its stages are done."""
    from quantize.runs import refuse_finished
    from train.config_loading import load_config
    from train.rundir import RunDir

    if others:
        raise UserError(f"--resume continues a run as it was configured; leave out {' '.join(others)}")
    directory = RunDir.open(run, root)
    refuse_finished(directory.path)
    code = _print_plan(load_config(directory.path / "config.resolved.json"))
    stages = directory.read_json("manifest.json").get("stages", {})
    done = [name for name, stage in stages.items() if stage.get("status") == "done"]
    print(f"\nalready done in {directory.path}, skipped where the inputs are the same: {', '.join(done) or 'nothing'}")
    return code


def print_help(line: CommandLine) -> None:
    """Help built from the config's own models; with --config its values are the defaults."""
    import contextlib

    import tyro

    from quantize.schemes import SCHEMES
    from train.config import LoraConfig, RunConfig
    from train.config_loading import load_config
    from train.help import HelpLine

    if line.config:
        settings = dict(load_config(line.config, line.overrides))
        settings["lora"] = settings["lora"] or LoraConfig()  # shown also where the config turns it off
    else:
        settings = dict(RunConfig.model_validate({"model": {"id": "REQUIRED"}, "data": {"train": "REQUIRED"}}))
    schemes = "\n\n".join(f"  --qat {scheme.name}: {scheme.summary}" for scheme in SCHEMES.values())
    default = HelpLine.model_construct(**settings)
    markers = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)
    with contextlib.suppress(SystemExit):  # tyro's way to end after printing
        tyro.cli(
            HelpLine,
            prog="train",
            description=f"{_DESCRIPTION}\n\n{schemes}",
            args=["--help"],
            default=default,
            config=markers,
            use_underscores=True,
        )


def _failure(error: BaseException, *, debug: bool) -> str:
    first = next(iter(str(error).splitlines()), "")
    log = getattr(error, "log", None)
    where = f"; log: {log}" if log else "; the run's events.jsonl tells how far it came"
    hint = "" if debug else "; run again with --debug for the traceback"
    return f"failed: {type(error).__name__}: {first}{where}{hint}"
