"""`quantize sensitivity RUN_OR_FOLDER`: the scan of `quantize.sensitivity` over a run or a checkpoint, as a page."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.arms import format_difference, format_divergence
from quantize.document import Block, Code, Figure, Figures, Heading, Items, Paragraph, Table, to_html, to_markdown
from quantize.errors import UserError
from quantize.files import is_neither, make_folder, refuse_run, write_atomically, writing_to
from quantize.runs import find_run, read_gathered

_ROWS = 12  # of each table of groups; sensitivity.json has all


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line asks for; None = the run's own, or the default.

    Attributes:
        source: run directory, name of a run under `root`, or a checkpoint's folder.
        data: held-out text (see `quantize.texts`); a run has its own.
        samples: how many of them.
        ways: of `quantize.sensitivity.WAYS`.
        growth: share by which the weights may grow.
        output: folder of the report.
    """

    source: str
    root: str = "runs"
    scheme: str | None = None
    target: str | None = None
    group_size: int | None = None
    data: Path | None = None
    samples: int = 128
    batch_size: int = 8
    ways: Sequence[str] = ("block", "kind")
    growth: float = 0.1
    output: Path | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Subject:
    """What is scanned: an unquantised checkpoint, its format as the worker takes it, and where it came from.

    `trained`: the format that its run ships, empty where it quantises nothing; None = not from a run.
    """

    model: Path
    name: str
    format: Mapping[str, Any]
    data: Path
    dtype: str
    grid: Path | None
    output: Path
    trust_remote_code: bool
    trained: Mapping[str, Any] | None


def study(asked: Asked, progress: Any = None) -> tuple[str, Path]:
    """Scans and writes sensitivity.json, report.md, report.html and plots/.

    Returns:
        The text of report.md, and the folder.

    Raises:
        UserError: there is no such run or checkpoint, no data, or a format that reaches nothing.
    """
    from quantize.plots import draw_sensitivity
    from quantize.worker import run_jobs

    if asked.samples < 2:
        raise UserError("--samples: 2 or more; half of them measure the groups, half what is proposed")
    if asked.batch_size < 1:
        raise UserError(f"--batch-size {asked.batch_size}: 1 or more")
    if not 0 < asked.growth < math.inf:
        raise UserError(f"--growth {asked.growth}: a share above 0, such as 0.1 for a tenth")
    if asked.output is not None:
        refuse_run(asked.output)
    subject = _subject(asked)
    job = {
        "kind": "sensitivity",
        "name": "sensitivity",
        "model": str(subject.model),
        "dtype": subject.dtype,
        "simulate": subject.format,
        "grid": str(subject.grid) if subject.grid else None,
        "data": str(subject.data),
        "samples": asked.samples,
        "batch_size": asked.batch_size,
        "ways": list(dict.fromkeys(asked.ways)),
        "growth": asked.growth,
        "trust_remote_code": subject.trust_remote_code,
    }
    output = subject.output
    make_folder(output)
    request = output / "sensitivity.request.json"  # beside it the log, where something fails
    (found,) = run_jobs([job], request, progress)
    for path in output.glob(f"{request.stem}.*"):
        path.unlink()
    found = {"model": subject.name, "format": dict(subject.format), "data": str(subject.data), **found}
    plots = draw_sensitivity(found)
    blocks = list(_blocks(found, subject, [Figure(f"plots/{plot.name}.png", plot.caption, plot.svg) for plot in plots]))
    text = to_markdown(blocks)
    with writing_to(output):
        (output / "plots").mkdir(exist_ok=True)
        for plot in plots:
            (output / "plots" / f"{plot.name}.png").write_bytes(plot.png)
        write_atomically(output / "sensitivity.json", json.dumps(found, indent=1, allow_nan=False))
        write_atomically(output / "report.md", text)
        write_atomically(output / "report.html", to_html(f"sensitivity of {subject.name}", blocks))
    return text, output


def _subject(asked: Asked) -> Subject:
    from quantize.hardware import pick_target
    from quantize.schemes import SCHEMES, find_scheme

    run = find_run(asked.source, asked.root)
    gathered = read_gathered(run) if run is not None else None
    trained: dict[str, Any] = (gathered and gathered["format"]) or {}
    name = asked.scheme or trained.get("scheme")
    folder = Path(asked.source) if run is None else run / "merged"
    if not (folder / "config.json").is_file() and run is not None:
        raise UserError(f"{folder} is gone; make it anew with: train --resume {run}")
    if not (folder / "config.json").is_file():
        raise is_neither(asked.source, asked.root, "a folder with a config.json")
    if name is None:
        raise UserError(f"--scheme: say which format, one of {', '.join(SCHEMES)}")
    if asked.data is None and run is None:
        raise UserError("--data: name held-out text for this checkpoint, a .jsonl, .txt or .parquet file")
    scheme = find_scheme(name)
    same = trained.get("scheme") == name
    target, _ = pick_target(scheme, asked.target or (trained["target"] if same else None))
    group_size = trained["group_size"] if same and asked.group_size is None else asked.group_size
    chosen = {
        "scheme": name,
        "target": target.name,
        "group_size": scheme.pick_group_size(group_size, target),
        "skip": trained["skip"] if same else [],
    }
    as_trained = same and all(chosen[key] == trained[key] for key in ("target", "group_size"))
    grid = run / "grid" if run is not None and as_trained and (run / "grid").is_dir() else None
    return Subject(
        model=folder,
        name=run.name if run is not None else folder.name,
        format=chosen,
        data=asked.data or folder.parent / "data" / "eval.parquet",
        dtype=_dtype(gathered),
        grid=grid,
        output=asked.output or (run / "sensitivity" if run is not None else Path("sensitivity")),
        trust_remote_code=asked.trust_remote_code or bool(gathered and gathered["trust_remote_code"]),
        trained=trained if run is not None else None,
    )


def _dtype(gathered: Mapping[str, Any] | None) -> str:
    """What ships, on a GPU; a CPU computes in float32, where bf16 is emulated and slow."""
    import torch

    if not torch.cuda.is_available():
        return "float32"
    return str(gathered["dtype"]) if gathered else "bfloat16"


def _blocks(found: Mapping[str, Any], subject: Subject, figures: Sequence[Figure]) -> Iterator[Block]:
    form = found["format"]
    yield Heading(f"Sensitivity of {subject.name}: {form['scheme']}, {form['target']}", 1)
    yield Paragraph(_verdict(found), strong=True)
    if found["proposal"]:
        yield Code(_command(subject, form, found["proposal"]))
    if found["sets"]:
        yield from _sets_section(found)
    if figures:
        yield Figures(figures)
    yield from _groups_section(found)
    if found["skipped"]:
        yield Paragraph(f"Not quantised by {form['scheme']}, and not measured:")
        yield Items([f"{name}: {reason}" for name, reason in found["skipped"].items()])


def _sets_section(found: Mapping[str, Any]) -> Iterator[Block]:
    yield Heading("What keeping layers unquantised buys")
    yield Paragraph(
        f"Everything quantised but these, on {found['n_samples']['sets']} samples other than those that chose the "
        "groups. KL divergence from the unquantised model, nats a token; differences are paired, 95% intervals in "
        "brackets. A larger set is proposed only where its step from the one above it is shown. Sizes are nominal: a "
        "16-bit scale a group."
    )
    rows = [("nothing", f"{found['all']['mib']:,.1f}", "", format_divergence(found["all"]["kl"]), "", "", "")]
    rows += [
        (", ".join(each["skip"]), f"{each['mib']:,.1f}", f"{each['growth']:+.1%}", format_divergence(each["kl"]),
         format_divergence(each["kl_change"], "+"), format_divergence(each["kl_step"], "+"),
         format_difference(each["loss_change"]))
        for each in found["sets"]
    ]  # fmt: skip
    header = ("kept", "MiB", "growth", "KL [95%]", "change [95%]", "step [95%]", "loss, change [95%]")
    yield Table(header, rows, numeric=frozenset(range(1, 7)))


def _groups_section(found: Mapping[str, Any]) -> Iterator[Block]:
    yield Heading("Group by group")
    yield Paragraph(
        f"Each group quantised alone, the rest unquantised, on {found['n_samples']['groups']} samples of "
        f"{found['data']}. The last column is the group's share of the divergence over its share of the weights."
    )
    for way in dict.fromkeys(row["way"] for row in found["groups"]):
        groups = [row for row in found["groups"] if row["way"] == way]
        rows = [
            (row["name"], str(len(row["layers"])), f"{row['weights']:,}", format_divergence(row["kl"]),
             format_difference(row["loss"]), f"{row['excess']:.1f}")
            for row in groups[:_ROWS]
        ]  # fmt: skip
        more = f" (the worst {_ROWS} of {len(groups)})" if len(groups) > _ROWS else ""
        yield Heading(f"By {way}{more}", 3)
        header = (way, "layers", "weights", "KL [95%]", "loss - unquantised [95%]", "excess")
        yield Table(header, rows, numeric=frozenset(range(1, 6)))


def _verdict(found: Mapping[str, Any]) -> str:
    form = found["format"]["scheme"]
    cost = f"Quantising everything to {form} moves the model {format_divergence(found['all']['kl'])} nats a token from "
    cost += "what it was (KL divergence)."
    if found["proposal"]:
        best = next(each for each in found["sets"] if each["skip"] == found["proposal"])
        change, names = format_divergence(best["kl_change"], "+"), " and ".join(found["proposal"])
        return f"{cost} Keeping {names} unquantised changes that by {change}, for {best['growth']:.1%} more weight."
    if found["sets"] and all(each["kl_change"]["low"] is None for each in found["sets"]):
        few = found["n_samples"]["sets"]
        return f"{cost} Nothing is proposed: {few} samples to confirm a proposal on are too few for an interval."
    if found["sets"]:
        return f"{cost} Nothing is proposed: that a first step lowers it is not shown on these samples."
    return (
        f"{cost} Nothing is proposed: no group stands out that would let the weights grow by no more than "
        f"{found['growth']:.0%} (--growth)."
    )


def _command(subject: Subject, form: Mapping[str, Any], proposal: Sequence[str]) -> str:
    """What makes the model with these layers unquantised, in the format that was scanned."""
    if subject.trained is not None:
        words = ["train", "--config", str(subject.model.parent / "config.yaml")]
        if form["scheme"] != subject.trained.get("scheme"):
            words += [f"--qat={form['scheme']}", "--quantize.scheme=null"]
        for key in ("target", "group_size"):
            if form[key] != subject.trained.get(key):
                words.append(f"--quantize.{key}={'null' if form[key] is None else form[key]}")
        skip = json.dumps([*form["skip"], *proposal])
        return shlex.join([*words, f"--quantize.skip={skip}", f"--run.name={subject.name}-skip"])
    words = ["quantize", "convert", str(subject.model), "--scheme", form["scheme"], "--target", form["target"]]
    words += [] if form["group_size"] is None else ["--group-size", str(form["group_size"])]
    return shlex.join([*words, "--skip", *proposal])
