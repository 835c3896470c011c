"""A stand-in for `vllm` where there is no GPU: `serve` over transformers on the CPU, in vLLM 0.23.0's protocol.

`make_environment` makes a folder that `quantize.serving.environment.find_vllm` takes for an installed vLLM and whose
bin/vllm runs this file. What it answers follows vllm/entrypoints/openai: the fields, the errors' form and codes, and
the log's form. FAKE_VLLM in the environment makes it fail as the real one does:
    oom         the engine's process runs out of GPU memory, the server's says so at the end
    validation  the config is refused before the engine starts
    stubborn    its processes ignore SIGTERM; it loads no model
    dies        it ends at the first request; it loads no model
    fails       its engine dies at the first request, which is answered with 500, and then it ends; it loads no model
    overflows   a log-probability is NaN; it loads no model
    full        the memory does not suffice for one token (`--max-model-len auto`), or for the whole context
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_NO_TEMPLATE = (
    "As of transformers v4.44, default chat template is no longer allowed, so you must provide a chat template if the "
    "tokenizer does not define one."
)
_OOM = """\
(EngineCore pid=11) INFO 06-01 12:00:00 [gpu_model_runner.py:4420] Starting to load model ...
(EngineCore pid=11) ERROR 06-01 12:00:09 [core.py:1136] EngineCore failed to start.
(EngineCore pid=11) ERROR 06-01 12:00:09 [core.py:1136] Traceback (most recent call last):
(EngineCore pid=11) ERROR 06-01 12:00:09 [core.py:1136]   File "vllm/v1/engine/core.py", line 1110, in run_engine_core
(EngineCore pid=11) ERROR 06-01 12:00:09 [core.py:1136]     engine_core = EngineCoreProc(*args, **kwargs)
(EngineCore pid=11) ERROR 06-01 12:00:09 [core.py:1136] torch.OutOfMemoryError: CUDA out of memory. Allocating 1 GiB
(EngineCore pid=11) Process EngineCore:
(EngineCore pid=11) Traceback (most recent call last):
(EngineCore pid=11)   File "multiprocessing/process.py", line 314, in _bootstrap
(EngineCore pid=11)     self.run()
(EngineCore pid=11) torch.OutOfMemoryError: CUDA out of memory. Allocating 1 GiB
(APIServer pid=10) Traceback (most recent call last):
(APIServer pid=10)   File "bin/vllm", line 8, in <module>
(APIServer pid=10)     sys.exit(main())
(APIServer pid=10) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
_FULL = """\
(EngineCore pid=11) Traceback (most recent call last):
(EngineCore pid=11)   File "vllm/v1/core/kv_cache_utils.py", line 1889, in _auto_fit_max_model_len
(EngineCore pid=11) ValueError: {}
"""
_NO_TOKEN = (
    "Cannot auto-fit max_model_len: not enough GPU memory available to serve even a single token. Try increasing "
    "`gpu_memory_utilization`."
)
_TOO_LONG = (
    "To serve at least one request with the models's max seq len ({}), (9.0 GiB KV cache is needed, which is larger "
    "than the available KV cache memory (1.0 GiB). "
)
_VALIDATION = """\
(APIServer pid=10) Traceback (most recent call last):
(APIServer pid=10)   File "vllm/config/model.py", line 500, in __post_init__
(APIServer pid=10) pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
(APIServer pid=10)   Value error, Model architectures ['OddForCausalLM'] are not supported for now.
"""


def make_environment(
    folder: Path, *, vllm: str = "0.23.0", torchao: str | None = "0.18.0", further: tuple[str, ...] = ()
) -> Path:
    """An environment as `python -m venv` and pip leave it, as far as it is looked at; `further`: name==version."""
    pins = [f"vllm=={vllm}", *([f"torchao=={torchao}"] if torchao else []), *further]
    for pin in pins:
        name, _, version = pin.partition("==")
        info = folder / "lib" / "python3.12" / "site-packages" / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    script = folder / "bin" / "vllm"
    script.parent.mkdir(parents=True)
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).resolve()}" "$@"\n')
    script.chmod(0o755)
    return folder


_DEAD = (
    "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root "
    "cause."
)


class BadRequest(Exception):
    """What is answered with HTTP 400, or another code."""

    def __init__(self, message: str, code: int = 400, kind: str = "BadRequestError") -> None:
        super().__init__(message)
        self.code, self.kind = code, kind


class Engine:
    """The model; one request at a time."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.root, self.lock = options.model, threading.Lock()
        self.names = options.served_model_name or [options.model]
        settings = json.loads((Path(self.root) / "config.json").read_text())
        own = settings["max_position_embeddings"]
        self.max_model_len = own if options.max_model_len in (None, "auto") else options.max_model_len
        self.defaults: dict[str, Any] = {}
        generation = Path(self.root) / "generation_config.json"
        said = json.loads(generation.read_text()) if generation.is_file() else {}
        if options.generation_config == "auto":
            self.defaults = said
        ends = said.get("eos_token_id")  # which it reads with --generation-config vllm, too
        self.ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])

    def load(self, options: argparse.Namespace) -> None:
        """Reads the folder as the real one does."""
        for name in ("sklearn", "scipy"):  # a quarter of the start, for what is not done here
            sys.modules[name] = None  # type: ignore[assignment]
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.torch = torch
        self._read_quantization(self.root, options.dtype)
        trust = {"trust_remote_code": options.trust_remote_code}
        self.tokenizer = AutoTokenizer.from_pretrained(self.root, **trust)
        if options.chat_template:
            self.tokenizer.chat_template = Path(options.chat_template).read_text()
        self.model = AutoModelForCausalLM.from_pretrained(self.root, **trust).eval()
        self.ends.add(self.tokenizer.eos_token_id)

    @staticmethod
    def _read_quantization(folder: str, asked: str) -> None:
        """As vllm.model_executor.layers.quantization.torchao.TorchAOConfig.from_config does; then the weights are
        copied into layers of the dtype that is asked for."""
        whole = json.loads((Path(folder) / "config.json").read_text())
        settings, dtype = whole.get("quantization_config"), whole.get("dtype") or whole.get("torch_dtype")
        if settings is None:
            return
        taken = asked if asked != "auto" else "bfloat16" if dtype == "float32" else dtype
        assert taken == dtype, f"tensor metadata does not match: scales of {dtype}, layers of {taken}"
        from torchao.core.config import config_from_dict

        assert settings["quant_method"] == "torchao", f"Unknown quantization method: {settings['quant_method']}"
        kind = settings["quant_type"]
        assert len(kind) == 1 and "default" in kind, "Expected only one key 'default' in quant_type dictionary"
        config_from_dict(kind["default"])

    def logits(self, ids: list[int]) -> Any:
        """(T, V), float32."""
        with self.torch.no_grad():
            return self.model(input_ids=self.torch.tensor([ids]), use_cache=False).logits[0].float()

    def prompt_logprobs(self, ids: list[int], count: int) -> list[dict[str, Any] | None]:
        """The token itself first, then the `count` most likely ones: vllm/logprobs.py."""
        found: list[dict[str, Any] | None] = [None]
        for row, token in zip(self.logits(ids)[:-1].log_softmax(-1), ids[1:], strict=True):
            top = row.topk(count) if count else None
            best = list(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top is not None else []
            entries = [(token, row[token].item(), int((row >= row[token]).sum()))]
            entries += [(each, value, rank) for rank, (each, value) in enumerate(best, 1)]
            found.append({
                str(each): {
                    "logprob": max(value, -9999.0), "rank": rank, "decoded_token": self.tokenizer.decode([each])
                }
                for each, value, rank in entries
            })  # fmt: skip
        return found

    def generate(self, ids: list[int], request: dict[str, Any]) -> dict[str, Any]:
        """Greedy; a choice without its index."""
        if request.get("temperature", self.defaults.get("temperature", 1.0)) != 0:
            raise BadRequest("this stand-in decodes greedily alone: temperature must be 0")
        penalty = request.get("repetition_penalty", self.defaults.get("repetition_penalty", 1.0))
        limit = min(request.get("max_tokens", 16), self.max_model_len - len(ids))
        stops, ignore = request.get("stop") or [], request.get("ignore_eos", False)
        stops = [stops] if isinstance(stops, str) else stops
        ends = (set() if ignore else self.ends) | set(request.get("stop_token_ids") or [])
        plain = request.get("skip_special_tokens", True)
        tokens: list[int] = []
        while len(tokens) < limit:
            row = self.logits([*ids, *tokens])[-1]
            seen = list({*ids, *tokens})
            row[seen] = self.torch.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
            tokens.append(int(row.argmax()))
            text = self.tokenizer.decode(tokens, skip_special_tokens=plain)
            stop = next((word for word in stops if word in text), None)
            if stop is not None:
                return {"tokens": tokens, "text": text[: text.index(stop)], "finish": "stop", "reason": stop}
            if tokens[-1] in ends:
                text = self.tokenizer.decode(tokens[:-1], skip_special_tokens=plain)
                return {"tokens": tokens, "text": text, "finish": "stop", "reason": None}
        text = self.tokenizer.decode(tokens, skip_special_tokens=plain)
        return {"tokens": tokens, "text": text, "finish": "length", "reason": None}

    def check_length(self, ids: list[int], wanted: int) -> None:
        """As vllm.renderers.params: the new tokens that are asked for must fit."""
        if len(ids) + wanted > self.max_model_len:
            raise BadRequest(
                f"This model's maximum context length is {self.max_model_len} tokens. However, you requested {wanted} "
                f"output tokens and your prompt contains {len(ids)} input tokens, for a total of {len(ids) + wanted} "
                f"tokens. Please reduce the length of the input prompt or the number of requested output tokens."
            )


def completions(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """/v1/completions of one prompt or several."""
    prompt = request.get("prompt")
    several = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], (list, str))
    choices, used = [], [0, 0]
    for each in prompt if several else [prompt]:
        ids = engine.tokenizer(each)["input_ids"] if isinstance(each, str) else each
        if not ids:
            raise BadRequest("Either prompt or prompt_embeds must be provided and non-empty.")
        if max(ids) >= len(engine.tokenizer):
            raise BadRequest(f"Token id {max(ids)} is out of vocabulary")
        engine.check_length(ids, request.get("max_tokens", 16))
        found = engine.generate(ids, request)
        asked = request.get("prompt_logprobs")
        choices.append({
            "index": len(choices), "text": found["text"], "logprobs": None, "finish_reason": found["finish"],
            "stop_reason": found["reason"], "token_ids": found["tokens"] if request.get("return_token_ids") else None,
            "prompt_logprobs": None if asked is None else engine.prompt_logprobs(ids, asked),
            "prompt_token_ids": ids if request.get("return_token_ids") else None, "routed_experts": None,
        })  # fmt: skip
        used = [used[0] + len(ids), used[1] + len(found["tokens"])]
    return _answer("text_completion", "cmpl", engine, choices, used)


def chat(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """/v1/chat/completions."""
    if engine.tokenizer.chat_template is None:
        raise BadRequest(_NO_TEMPLATE)
    encoded = engine.tokenizer.apply_chat_template(request["messages"], add_generation_prompt=True, return_dict=True)
    ids = encoded["input_ids"]
    engine.check_length(ids, request.get("max_tokens", 0))
    found = engine.generate(ids, {"max_tokens": engine.max_model_len, **request})
    message = {"role": "assistant", "content": found["text"], "refusal": None, "tool_calls": []}
    choice = {
        "index": 0, "message": message, "logprobs": None, "finish_reason": found["finish"],
        "stop_reason": found["reason"], "token_ids": None,
    }  # fmt: skip
    return _answer("chat.completion", "chatcmpl", engine, [choice], [len(ids), len(found["tokens"])])


def _answer(kind: str, prefix: str, engine: Engine, choices: list[Any], used: list[int]) -> dict[str, Any]:
    usage = {
        "prompt_tokens": used[0], "total_tokens": sum(used), "completion_tokens": used[1], "prompt_tokens_details": None
    }  # fmt: skip
    return {
        "id": f"{prefix}-1", "object": kind, "created": int(time.time()), "model": engine.names[0], "choices": choices,
        "service_tier": None, "system_fingerprint": None, "usage": usage, "kv_transfer_params": None,
    }  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """The routes; the engine is the class's own."""

    engine: Engine
    keys: list[str] | None
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/health":
            self._send(200, None)
        elif not self._is_allowed():
            self._send(401, {"error": "Unauthorized"})
        elif self.path == "/v1/models":
            cards = [
                {
                    "id": name, "object": "model", "created": int(time.time()), "owned_by": "vllm",
                    "root": self.engine.root, "parent": None, "max_model_len": self.engine.max_model_len,
                    "permission": [],
                }
                for name in self.engine.names
            ]  # fmt: skip
            self._send(200, {"object": "list", "data": cards})
        else:
            self._send(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if os.environ.get("FAKE_VLLM") == "dies":
            sys.stderr.write(_OOM)
            sys.stderr.flush()
            os.killpg(0, signal.SIGKILL)
        if not self._is_allowed():
            self._send(401, {"error": "Unauthorized"})
            return
        if os.environ.get("FAKE_VLLM") == "fails":
            self._die()
        if os.environ.get("FAKE_VLLM") == "overflows":
            said = "Out of range float values are not JSON compliant: nan"
            self._send(400, {"error": {"message": said, "type": "BadRequestError", "param": None, "code": 400}})
            return
        routes = {"/v1/completions": completions, "/v1/chat/completions": chat}
        try:
            if self.path not in routes:
                self._send(404, {"detail": "Not Found"})
                return
            if request.get("model") is not None and request["model"] not in self.engine.names:
                raise BadRequest(f"The model `{request['model']}` does not exist.", 404, "NotFoundError")
            with self.engine.lock:
                answer = routes[self.path](self.engine, request)
            self._send(200, answer)
        except BadRequest as error:
            told = {"message": str(error), "type": error.kind, "param": None, "code": error.code}
            self._send(error.code, {"error": told})

    def _is_allowed(self) -> bool:
        key = self.keys or [os.environ.get("VLLM_API_KEY")]
        return not any(key) or self.headers.get("Authorization") in [f"Bearer {each}" for each in key]

    def _die(self) -> None:
        """As vllm.entrypoints.serve.utils.server_utils.engine_error_handler: an answer, and then the end."""
        sys.stderr.write(_OOM)
        sys.stderr.write("(APIServer pid=10) Traceback (most recent call last):\n" + "  File\n" + _DEAD + "\n")
        sys.stderr.flush()
        message = _DEAD.partition(": ")[2]
        self._send(500, {"error": {"message": message, "type": "InternalServerError", "param": None, "code": 500}})
        self.wfile.flush()
        os.killpg(0, signal.SIGKILL)

    def _send(self, code: int, body: Any) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def main() -> int:
    """`vllm serve FOLDER [options]`; an option that the real one lacks is an error, as there."""
    parser = argparse.ArgumentParser(prog="vllm serve")
    parser.add_argument("serve", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--max-model-len", type=lambda text: text if text == "auto" else int(text))
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--gpu-memory-utilization", type=float)
    parser.add_argument("--generation-config", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--chat-template")
    parser.add_argument("--tokenizer")
    parser.add_argument("--api-key", nargs="*")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--cudagraph-capture-sizes", nargs="+", type=int)
    parser.add_argument("--compilation-config.mode")
    parser.add_argument("--compilation-config.cudagraph_mode")
    options = parser.parse_args()
    mode = os.environ.get("FAKE_VLLM")
    if mode in ("oom", "validation"):
        sys.stderr.write(_OOM if mode == "oom" else _VALIDATION)
        return 1
    if mode == "full":
        context = json.loads((Path(options.model) / "config.json").read_text())["max_position_embeddings"]
        asked = options.max_model_len or context
        sys.stderr.write(_FULL.format(_NO_TOKEN if asked == "auto" else _TOO_LONG.format(asked)))
        return 1
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    worker = subprocess.Popen(["sleep", "600"])  # of the same process group, as the engine's workers are
    set_up = (
        f"second runner {os.environ.get('VLLM_USE_V2_MODEL_RUNNER')}, GPUs by {os.environ.get('CUDA_DEVICE_ORDER')}"
    )
    prefix = f"(APIServer pid={os.getpid()}) INFO 06-01 12:00:00 [utils.py:1]"
    print(f"{prefix} {set_up}; started, with worker {worker.pid}", flush=True)
    Handler.engine, Handler.keys = Engine(options), options.api_key
    if mode is None:
        Handler.engine.load(options)
    ThreadingHTTPServer.request_queue_size = 2048  # as uvicorn's: five would turn many clients at once away
    ThreadingHTTPServer((options.host or "0.0.0.0", options.port), Handler).serve_forever()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
