"""The same run through both backends, from training to the quantised checkpoint, compared in one go.

    python benchmarks/backends.py --config tiny.yaml --schemes int8-int4 --root /tmp/bench
    python benchmarks/backends.py --config quickstart.yaml --schemes int8-int4 int4 fp8 --root /tmp/bench \\
        -- --train.max-steps=20 --quantize.group-size=64

Both backends start from the same weights, adapters and order of rows (drawn on the CPU from one seed). For each scheme:
the loss of each training step side by side, what the shipped models lose, whether what was trained is what ships, the
median time of a step (the first three left out). The scheme `none` compares without QAT. Options after `--` go to
`train`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def main() -> int:
    """Runs, compares, prints one line a run and a table, writes ROOT/backends.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--schemes", nargs="+", default=["int8-int4", "int4", "fp8"])
    parser.add_argument("--backends", nargs="+", default=["unsloth", "peft"])
    parser.add_argument("--root", required=True, type=Path)
    parser.add_argument("--tolerance", type=float, default=0.02, help="largest mean |difference| of the step losses")
    parser.add_argument("--limit", type=float, default=600, help="seconds a run may take")
    options, rest = parser.parse_known_args()
    rest = [word for word in rest if word != "--"]
    rows, agree = [], True
    for scheme in options.schemes:
        runs = {}
        for backend in options.backends:
            runs[backend] = one_run(options, scheme, backend, rest)
            print(json.dumps(runs[backend]["line"]), flush=True)
        if all(run["losses"] for run in runs.values()) and len(runs) == 2:
            first, second = (run["losses"] for run in runs.values())
            gaps = [abs(a - b) for a, b in zip(first, second, strict=True)]
            row = {"scheme": scheme, "steps": len(gaps), "mean": statistics.fmean(gaps), "largest": max(gaps)}
            print(json.dumps({"compared": row}), flush=True)
            agree &= row["mean"] <= options.tolerance
            rows.append(row)
        else:
            agree = False
    (options.root / "backends.json").write_text(json.dumps(rows, indent=1))
    print("agree" if agree else f"DISAGREE: a mean difference above {options.tolerance}, or a run failed")
    return 0 if agree else 1


def one_run(options: argparse.Namespace, scheme: str, backend: str, rest: list[str]) -> dict[str, Any]:
    """One `train`; its losses by step and a line of results."""
    name = f"{Path(options.config).stem}-{scheme}-{backend}"
    command = [sys.executable, "-m", "train", "--config", options.config]
    command += [] if scheme == "none" else ["--qat", scheme, "--fake-quant.start=0"]
    command += [f"--model.backend={backend}", f"--run.root={options.root}", f"--run.name={name}", *rest]
    started = time.monotonic()
    options.root.mkdir(parents=True, exist_ok=True)
    with (options.root / f"{name}.log").open("w") as log:
        try:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=options.limit).returncode
        except subprocess.TimeoutExpired:
            code = 124
    line: dict[str, Any] = {"run": name, "exit": code, "seconds": round(time.monotonic() - started, 1)}
    folder = options.root / name
    losses: list[float] = []
    if (folder / "events.jsonl").is_file():
        events = [json.loads(text) for text in (folder / "events.jsonl").read_text().splitlines()]
        steps = [event for event in events if event["kind"] == "step" and event["arm"] == "tuned"]
        losses = [event["loss"] for event in steps]
        times = [b["time"] - a["time"] for a, b in itertools.pairwise(steps[2:])]
        if times:
            line |= {"step_ms": round(1000 * statistics.median(times), 1), "first": losses[0], "last": losses[-1]}
    if (folder / "metrics.json").is_file():
        metrics = json.loads((folder / "metrics.json").read_text())
        line |= {name: metrics[name] for name in ("train_ship_gap", "backend_gap", "simulated")}
        line |= {f"{arm}.loss": metrics[arm]["loss"] for arm in ("base", "base_quantized", "tuned", "final")}
        line |= {"kl": metrics["kl"]["final"], "size": metrics["size"]}
    return {"line": line, "losses": losses}


if __name__ == "__main__":
    sys.exit(main())
