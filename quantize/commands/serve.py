"""`quantize serve`: vLLM's server over a run or a folder, after what would fail in it was looked for."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.commands.options import add_root
from quantize.errors import UserError
from quantize.files import is_neither

if TYPE_CHECKING:
    from quantize.serving.check import Served
    from quantize.serving.environment import Vllm

SUMMARY = "serve what a run ships, or any folder, with vLLM; what vLLM cannot load is refused with the reason"
PASSES_ON = True
"""What stands after `--` is vLLM's."""
_PROMPT = "What is the sum of 12 and 30?"
_TOKENS = 32
_ANOTHERS = ("--api-key", "--uds", "--root-path", "--headless")
"""Options of `vllm serve` by which it is asked elsewhere or otherwise than a measurement asks."""
_FITTED = ("--max-model-len", "auto")
"""A measurement takes as much of the model's context as memory allows."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is served, where, and what is done in place of serving."""
    parser.add_argument(
        "source", metavar="RUN_OR_FOLDER", nargs="?", help="run directory or name, or a transformers folder, quantised "
        "or not; after it, `--` and further options of `vllm serve`",
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (default: 8000)")
    parser.add_argument(
        "--env", type=Path, metavar="FOLDER", help="vLLM's environment (default: $ONGRID_VLLM, beside this Python, on "
        "PATH, or what --setup made)",
    )  # fmt: skip
    parser.add_argument(
        "--setup", action="store_true", help="make an environment with the exact packages of vLLM, and end"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="check, print the command that would serve, and end")
    instead.add_argument(
        "--smoke-test",
        action="store_true",
        help="start it on a free port, ask its endpoint once, print the answer, end",
    )
    instead.add_argument(
        "--check", action="store_true", help="compare it with transformers on the same checkpoint, loss and greedy "
        "tokens on held-out samples, and end",
    )  # fmt: skip
    parser.add_argument("--data", type=Path, help="of --check: held-out text (default: the run's own)")
    parser.add_argument("--samples", type=int, default=64, help="of --check: how many of them (default: 64)")
    parser.add_argument("--tokens", type=int, default=64, help="of --check: greedy tokens of each (default: 64)")
    parser.add_argument("--completions-only", action="store_true", help="take a tokenizer without a chat template")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the checkpoint's own code")
    add_root(parser)


def run(options: argparse.Namespace) -> None:
    """Refuses what can be seen without an engine; then this process becomes vLLM's, unless something else is asked."""
    from quantize.serving.check import check_folder
    from quantize.serving.environment import find_vllm
    from quantize.serving.gpu import by_numbers, look_at_gpu

    if options.setup:
        _set_up(options.env)
        return
    _refuse_odd(options)
    folder, name = _find(options.source, options.root)
    # A file of options (--config) may name anything.
    elsewhere = _gives(options.further, "--tokenizer", "--config")
    chat = not options.completions_only and not options.check and not _gives(options.further, "--chat-template")
    trust = options.trust_remote_code or _gives(options.further, "--trust-remote-code")
    check = partial(check_folder, chat=chat, tokenizer=not elsewhere, trust_remote_code=trust)
    vllm: Vllm | None = None
    try:
        vllm = find_vllm(options.env)
    except UserError as error:
        # First what no installation would change: whether vLLM takes this folder at all.
        check(folder)
        if not options.dry_run or options.env is not None:
            raise
        print(f"note: {error}", file=sys.stderr)
    served = check(folder, vllm, name=name)
    command = _command(served, vllm, options)
    if options.dry_run or vllm is None:
        print(shlex.join(command))
        return
    look_at_gpu(served, vllm)
    if options.smoke_test:
        _smoke_test(served, vllm, options.further)
    elif options.check:
        _check(served, vllm, options)
    else:
        print(f"{folder} as {name} at http://{options.host}:{options.port}/v1, vLLM {vllm.version}", file=sys.stderr)
        sys.stderr.flush()
        os.execve(
            vllm.executable, command, vllm.environment() | by_numbers()
        )  # signals and the exit code are vLLM's own


def _refuse_odd(options: argparse.Namespace) -> None:
    if options.source is None:
        raise UserError("say which run or folder to serve: quantize serve RUN_OR_FOLDER")
    if options.data is not None and not options.check:
        raise UserError("--data is what --check compares on; say --check, too")
    for name in ("samples", "tokens"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: give a number from 1 on")
    for option in ("--host", "--port"):
        if _gives(options.further, option):
            raise UserError(f"{option} is quantize serve's own: give it before the --")
    asked = next((f"--{name}" for name in ("smoke-test", "check") if getattr(options, name.replace("-", "_"))), None)
    for word in options.further if asked else ():
        if _gives([word], *_ANOTHERS) or word.startswith("--ssl"):
            raise UserError(
                f"{asked} asks a server of its own, at a free port of this machine and without a key: leave "
                f"{word.partition('=')[0]} out"
            )


def _set_up(folder: Path | None) -> None:
    from quantize.serving.environment import find_vllm, install, made_folder

    place = folder or made_folder()
    install(place)
    where = f" --env {place}" if folder else ""
    print(f"vLLM {find_vllm(place).version} is installed in {place}; use it with: quantize serve RUN{where}")


def _find(source: str, root: str) -> tuple[Path, str]:
    """The folder to serve, and what its model is called: as the run is, or the folder."""
    from quantize.runs import find_run, finish_command, read_gathered

    run = find_run(source, root)
    if run is None:
        folder = Path(source).expanduser()
        if not (folder / "config.json").is_file():
            raise is_neither(source, root, "a folder with a config.json")
        return folder, folder.resolve().name
    if (run / "quantized" / "config.json").is_file():
        return run / "quantized", run.resolve().name
    chosen = read_gathered(run)["format"]
    if chosen is None:
        raise UserError(f"{run} quantises nothing; serve its 16-bit weights: quantize serve {run / 'merged'}")
    raise UserError(
        f"{run} was only simulated, and what ships is not written yet: {chosen['target']} does not run where it was "
        f"trained. Finish it where it does: {finish_command(run, chosen['target'])}"
    )


def _gives(further: Sequence[str], *options: str) -> bool:
    """Whether one of these options is among vLLM's, which takes --max_model_len for --max-model-len."""
    return any(word.partition("=")[0].replace("_", "-") in options for word in further)


def _command(served: Served, vllm: Vllm | None, options: argparse.Namespace) -> list[str]:
    """What serves; the user's own arguments come last, and win."""
    return [
        str(vllm.executable) if vllm else "vllm", "serve", str(served.folder), "--served-model-name", served.name,
        "--host", options.host, "--port", str(options.port), *served.arguments, *options.further,
    ]  # fmt: skip


def _smoke_test(served: Served, vllm: Vllm, further: Sequence[str]) -> None:
    """Starts it, asks once, prints what came, and ends it."""
    from quantize.serving import client
    from quantize.serving.server import serving

    log = _log(served)
    started = time.monotonic()
    arguments = (*served.arguments, *_FITTED, *further)
    with serving(served.folder, vllm, log=log, arguments=arguments, model=served.name) as server:
        seconds = time.monotonic() - started
        chats = served.chats or _gives(further, "--chat-template")
        ask = client.chat if chats else client.continue_text
        answer = ask(server, _PROMPT, min(_TOKENS, server.max_length // 2))
    place = "/v1/chat/completions" if chats else "/v1/completions"
    print(f"vLLM {vllm.version} serves {server.model}, {server.max_length} tokens long, after {seconds:.0f} s")
    print(f"{place}: {_PROMPT!r} -> {answer!r}")
    log.unlink()


def _check(served: Served, vllm: Vllm, options: argparse.Namespace) -> None:
    """Compares it with transformers, prints what was found, and fails where they are apart."""
    from quantize.serving.agreement import Asked, compare, describe

    data = options.data or served.folder.parent / "data" / "eval.parquet"
    if not data.is_file():
        raise UserError(f"--check needs held-out text, and {data} is not there: give some with --data FILE")
    log = _log(served)
    asked = Asked(
        data, options.samples, options.tokens, (*served.arguments, *_FITTED, *options.further), "--trust-remote-code" in
        served.arguments,
    )  # fmt: skip
    found = compare(served, vllm, asked, log)
    print("\n".join(describe(found)))
    if found.fault:
        raise RuntimeError(f"{found.fault}\nall of its log is {log}")
    log.unlink()


def _log(served: Served) -> Path:
    """Where vLLM prints; the file stays where something fails, as the message names it."""
    return Path(tempfile.gettempdir()) / f"vllm-{served.name}-{os.getpid()}.log"
