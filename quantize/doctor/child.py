"""What only an import tells, in a process of its own: a library that crashes or hangs takes nothing else along.

`ask` starts `python -m quantize.doctor.child QUESTION`, which prints each answer as soon as it is known.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_MARK = "@found "
TIMEOUT_S = 120
IMPORTS = (
    "transformers.modeling_utils",
    "peft",
    "trl.trainer.sft_trainer",
    "unsloth",
    "triton",
    "bitsandbytes",
    "mslk.gemm",
)


def ask(*question: str, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """The answers by name. `failed` holds why the process ended early, and `seconds` how long it took."""
    project = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(filter(None, [project, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
    command, started = [sys.executable, "-m", "quantize.doctor.child", *question], time.monotonic()
    out: str | bytes | None
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=timeout_s, env=environment,
        )  # fmt: skip
        out, failed = done.stdout, _why(done)
    except subprocess.TimeoutExpired as error:
        out, failed = error.stdout, f"no answer in {timeout_s:g} s"
    except OSError as error:
        out, failed = "", str(error)
    text = out.decode(errors="replace") if isinstance(out, bytes) else out or ""
    answers: dict[str, Any] = {"seconds": round(time.monotonic() - started, 1)}
    for line in text.splitlines():
        if line.startswith(_MARK):
            answers |= json.loads(line.removeprefix(_MARK))
    return answers | ({"failed": failed} if failed else {})


def _why(done: subprocess.CompletedProcess[str]) -> str | None:
    if done.returncode == 0:
        return None
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if done.returncode < 0:
        return f"ended by signal {-done.returncode}"
    return said[-1] if said else f"exit code {done.returncode}"


def _say(**answer: Any) -> None:
    print(_MARK + json.dumps(answer), flush=True)


def _torch() -> None:
    """torch, the GPUs it sees, the formats' targets, torchao: in the order in which they may fail."""
    import warnings

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        import torch

        available = torch.cuda.is_available()
    _say(
        torch={
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "available": available,
        }
    )
    if available:
        _say(devices=[_device(number) for number in range(torch.cuda.device_count())])
    elif torch.version.cuda:
        try:
            torch.cuda.init()
        except Exception as error:
            _say(no_gpu=str(error).splitlines()[0])
        else:
            _say(no_gpu=str(said[-1].message).splitlines()[0] if said else "torch sees no GPU")
    from quantize.hardware import missing_for
    from quantize.schemes import SCHEMES

    targets = {
        scheme.name: {name: missing_for(target) for name, target in scheme.targets.items()}
        for scheme in SCHEMES.values()
    }
    _say(targets=targets)
    _torchao()


def _device(number: int) -> dict[str, Any]:
    """One GPU; `computes` is None where it does, else why it does not."""
    import torch

    found = torch.cuda.get_device_properties(number)
    known: dict[str, Any] = {"name": found.name, "capability": f"{found.major}.{found.minor}"}
    try:
        known["free_gib"] = torch.cuda.mem_get_info(number)[0] / 2**30
        assert (torch.ones(2, device=f"cuda:{number}") + 1).sum().item() == 4
    except Exception as error:
        return known | {"computes": str(error).splitlines()[0] if str(error) else type(error).__name__}
    return known | {"computes": None}


def _torchao() -> None:
    """torchao, with what it logs while it is imported."""
    import logging

    said: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logging.getLogger("torchao").addHandler(Kept())
    import torchao.quantization  # noqa: F401

    _say(torchao={"said": said})


def main(question: list[str]) -> None:
    """`torch`, or `import NAME`."""
    if question[0] == "torch":
        _torch()
    else:
        import importlib

        importlib.import_module(question[1])
        _say(imported=question[1])


if __name__ == "__main__":
    main(sys.argv[1:])
