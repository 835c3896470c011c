"""A fresh process for everything that must happen in the plain graph.

The training process has unsloth's class-level patches at work, so evaluation of what ships and the conversion itself
run here, where neither unsloth nor the training code is imported. `run_jobs` (parent) writes a request, starts
`python -m quantize.worker REQUEST`, forwards its progress and returns its results.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantize.errors import UserError

Progress = Callable[[str, int, int], None]


def run_jobs(
    jobs: Sequence[Mapping[str, Any]], request: Path, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Runs jobs in a fresh process, in order, and returns one result a job.

    Args:
        jobs: each a mapping with `kind` ("evaluate" or "convert") and that function's arguments.
        request: where the request is written; the answer lies beside it.
        progress: called with (job's name, done, total).

    Raises:
        UserError: what the worker found wrong with the input.
        RuntimeError: the worker failed; the message ends with its last lines, all of them lie beside the request.
    """
    answer, log = request.with_suffix(".answer.json"), request.with_suffix(".log")
    request.parent.mkdir(parents=True, exist_ok=True)
    request.write_text(json.dumps(list(jobs), indent=1), encoding="utf-8")
    answer.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
    project = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [project, environment.get("PYTHONPATH")]))
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "quantize.worker", str(request)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if progress is not None and line.startswith("@progress "):
                    name, done, total = json.loads(line.removeprefix("@progress "))
                    progress(name, done, total)
            code = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
    if code == 0:
        return json.loads(answer.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    if code == 2:
        raise UserError(*json.loads(answer.read_text(encoding="utf-8")))
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
    raise RuntimeError(f"the evaluation process failed with exit code {code}; its log is {log}:\n{tail}")


def evaluate(job: Mapping[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Scores one checkpoint, quantised or not, or the simulation of its quantised form.

    Keys: model, dtype, data (parquet), batch_size, scores (npz to write); optional simulate {scheme, target,
    group_size}, reference (a checkpoint to measure KL from), trust_remote_code.
    """
    import torch

    from quantize.convert import load_plain, memory_bytes
    from quantize.evaluate import evaluate_model, read_samples
    from quantize.layers import select_layers
    from quantize.schemes import find_scheme
    from quantize.simulate import simulate_

    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"device": device, "trust_remote_code": job.get("trust_remote_code", False)}
    model = load_plain(Path(job["model"]), dtype=job.get("dtype"), **options)
    memory = memory_bytes(model)
    if simulate := job.get("simulate"):
        scheme = find_scheme(simulate["scheme"])
        coverage = select_layers(model, scheme, simulate["group_size"])
        simulate_(model, scheme, scheme.find_target(simulate["target"]), simulate["group_size"], coverage)
    reference = None
    if job.get("reference"):
        reference = load_plain(Path(job["reference"]), dtype=job.get("reference_dtype"), **options)
    samples = read_samples(Path(job["data"]))
    scores = evaluate_model(model, samples, batch_size=job["batch_size"], reference=reference, progress=progress)
    scores.save(Path(job["scores"]))
    return {"loss": scores.loss, "kl": scores.kl_per_token, "memory_bytes": memory}


def convert(job: Mapping[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Converts one checkpoint. Keys: source, output, scheme, target, group_size, dtype; optional trust_remote_code."""
    import torch

    from quantize.convert import convert_checkpoint
    from quantize.schemes import find_scheme

    scheme = find_scheme(job["scheme"])
    coverage = convert_checkpoint(
        Path(job["source"]),
        Path(job["output"]),
        scheme,
        scheme.find_target(job["target"]),
        group_size=job["group_size"],
        dtype=job["dtype"],
        device="cuda" if torch.cuda.is_available() else "cpu",
        trust_remote_code=job.get("trust_remote_code", False),
    )
    progress(1, 1)
    return {"coverage": coverage.as_dict()}


def _end_with_parent() -> None:
    """The parent holds the other end of stdin: once it is gone, even by SIGKILL, its resumed run writes these files."""
    while os.read(0, 1):  # not through sys.stdin, whose lock the interpreter wants when it ends
        pass
    os._exit(1)


def main(argv: Sequence[str]) -> int:
    """Entry of the fresh process: `python -m quantize.worker REQUEST`."""
    import gc
    import threading

    threading.Thread(target=_end_with_parent, daemon=True).start()
    request = Path(argv[0])
    answer = request.with_suffix(".answer.json")
    kinds = {"evaluate": evaluate, "convert": convert}
    results = []
    try:
        for job in json.loads(request.read_text(encoding="utf-8")):

            def report(done: int, total: int, name: str = job["name"]) -> None:
                print("@progress", json.dumps([name, done, total]), flush=True)

            results.append(kinds[job["kind"]](job, report))
            gc.collect()
    except UserError as error:
        answer.write_text(json.dumps(error.lines), encoding="utf-8")
        return 2
    forbidden = {"unsloth", "unsloth_zoo", "train", "qat"} & set(sys.modules)
    assert not forbidden, f"the plain process imported {forbidden}"
    answer.write_text(json.dumps(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
