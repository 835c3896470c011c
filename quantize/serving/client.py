"""What is asked of a server that speaks vLLM's form of OpenAI's protocol, in token ids: completions and scores."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from quantize.errors import UserError

if TYPE_CHECKING:
    from quantize.serving.server import Server

AT_ONCE = 64
"""Requests that wait at the same time: the engine batches them as its memory allows."""
_ANSWER_SECONDS = 3600.0
_LOG_SECONDS = 2.0
"""An engine that fails says so to who waits before all of its log is written."""
_NO_NUMBER = "Out of range float values are not JSON compliant"
"""What vLLM answers for a log-probability that is NaN or infinite, with the code of a request that is wrong."""
# Loopback is asked directly, whatever http_proxy says.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

Progress = Callable[[int, int], None]
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Completion:
    """What the model wrote after a prompt.

    Attributes:
        tokens: ids, the end token included where it ended by it.
        text: without special tokens.
        finish_reason: "stop" (end token or stop string) or "length".
    """

    tokens: list[int]
    text: str
    finish_reason: str


@dataclass(frozen=True)
class Score:
    """How likely a sequence of T tokens is; each list has T - 1 entries, for all tokens but the first.

    Attributes:
        logprobs: of the token that is there, natural logarithm.
        argmax: the most likely token's id. argmax_logprobs: its log-probability.
    """

    logprobs: list[float]
    argmax: list[int]
    argmax_logprobs: list[float]


def is_healthy(url: str) -> bool:
    """Whether the engine is up."""
    try:
        with _opener.open(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):
        return False


def describe(url: str, log: Path | None = None, hint: str = "") -> dict[str, Any]:
    """The model that is served: `id`, `max_model_len` and more."""
    found: dict[str, Any] = _ask(url, "/v1/models", None, log, hint)["data"][0]
    return found


def complete(
    server: Server,
    prompts: Sequence[Sequence[int]],
    max_tokens: int | Sequence[int],
    *,
    stop: Sequence[str] | Sequence[Sequence[str]] = (),
    ignore_eos: bool = False,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> list[Completion]:
    """Greedy continuations.

    Args:
        prompts: token ids of each, as the tokenizer gives them; nothing is added.
        max_tokens: new tokens at most, for all or for each. With the prompt no more than `server.max_length`.
        stop: strings that end an answer and are left out of its text, for all or for each.
        ignore_eos: go on after the end token.
        options: further fields of the request, by vLLM's names.

    Raises:
        UserError: the GPU's memory did not suffice, or a number of the model overflows.
        RuntimeError: the server refused a request, or is gone.
    """
    limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
    ends = [stop] * len(prompts) if all(isinstance(each, str) for each in stop) else stop

    def ask(number: int) -> Completion:
        request = {"max_tokens": limits[number], "stop": list(ends[number]), "ignore_eos": ignore_eos}
        choice = _completions(server, prompts[number], {**request, "return_token_ids": True, **(options or {})})
        return Completion(choice["token_ids"], choice["text"], choice["finish_reason"])

    return _all(ask, len(prompts), progress)


def score(server: Server, sequences: Sequence[Sequence[int]], progress: Progress | None = None) -> list[Score]:
    """Log-probabilities of whole sequences of token ids.

    By `prompt_logprobs`, which names tokens by their ids: `echo` with `logprobs` names them by their texts, which two
    tokens may share, and has no rank.

    Args:
        sequences: each of 1 to `server.max_length` - 1 tokens: the protocol wants room for one new one.

    Raises:
        UserError: the GPU's memory did not suffice, or a number of the model overflows.
        RuntimeError: the server refused a request, or is gone.
    """

    def ask(number: int) -> Score:
        sequence = sequences[number]
        choice = _completions(server, sequence, {"max_tokens": 1, "prompt_logprobs": 1})
        found = Score([], [], [])
        for token, entry in zip(sequence[1:], choice["prompt_logprobs"][1:], strict=True):
            # The token itself and the most likely one, whose rank is 1; one entry where they are the same.
            best = next(key for key, value in entry.items() if value["rank"] == 1)
            found.logprobs.append(entry[str(token)]["logprob"])
            found.argmax.append(int(best))
            found.argmax_logprobs.append(entry[best]["logprob"])
        return found

    return _all(ask, len(sequences), progress)


def chat(server: Server, text: str, max_tokens: int) -> str:
    """The answer to one message, greedily, in the tokenizer's chat template."""
    messages = [{"role": "user", "content": text}]
    request = {"model": server.model, "messages": messages, "max_tokens": max_tokens, "temperature": 0.0}
    answer = _ask(server.url, "/v1/chat/completions", request, server.log, server.hint)
    content = answer["choices"][0]["message"]["content"]
    return content or ""


def continue_text(server: Server, text: str, max_tokens: int) -> str:
    """What follows a text, greedily."""
    answer: str = _completions(server, text, {"max_tokens": max_tokens})["text"]
    return answer


def _completions(server: Server, prompt: str | Sequence[int], options: dict[str, Any]) -> dict[str, Any]:
    """One choice. A repetition penalty of the folder's own would hold for greedy decoding too: there is none."""
    asked = prompt if isinstance(prompt, str) else list(prompt)
    request = {"model": server.model, "prompt": asked, "temperature": 0.0, "repetition_penalty": 1.0, **options}
    choice: dict[str, Any] = _ask(server.url, "/v1/completions", request, server.log, server.hint)["choices"][0]
    return choice


def _all(ask: Callable[[int], _Result], count: int, progress: Progress | None) -> list[_Result]:
    """Asks for each number below `count`, many at once; in their order."""
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        found = []
        for result in pool.map(ask, range(count)):
            found.append(result)
            if progress is not None:
                progress(len(found), count)
        return found
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after an error nobody waits for the others


def _ask(url: str, path: str, request: dict[str, Any] | None, log: Path | None, hint: str) -> dict[str, Any]:
    body = None if request is None else json.dumps(request).encode()
    headers = {"Content-Type": "application/json"}
    try:
        asked = urllib.request.Request(f"{url}{path}", data=body, headers=headers)
        with _opener.open(asked, timeout=_ANSWER_SECONDS) as answer:
            found: dict[str, Any] = json.loads(answer.read())
            return found
    except urllib.error.HTTPError as error:
        raise _refused(url, path, error, log, hint) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = getattr(error, "reason", None) or error or type(error).__name__
        raise _ended(f"vLLM at {url} no longer answers ({why})", log, hint) from error


def _refused(url: str, path: str, error: urllib.error.HTTPError, log: Path | None, hint: str) -> Exception:
    """From 500 on it is the engine that failed, and its log says why: the answer does not."""
    try:
        said = _message(error)
    except (OSError, http.client.HTTPException):  # gone while it answered
        said = str(error.reason)
    if _NO_NUMBER in said:
        return UserError(
            "vLLM computed a log-probability that is NaN or infinite: the model's numbers overflow in this dtype; "
            "convert it again with --dtype bfloat16, or float32"
        )
    if error.code < 500:
        return RuntimeError(f"vLLM refused {path} (HTTP {error.code}): {said}")
    until = time.monotonic() + _LOG_SECONDS
    while time.monotonic() < until and is_healthy(url):
        time.sleep(0.1)
    return _ended(f"vLLM failed at {path} (HTTP {error.code}: {said})", log, hint)


def _message(error: urllib.error.HTTPError) -> str:
    """The server's own words."""
    text = error.read().decode(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:500] or str(error.reason)


def _ended(what: str, log: Path | None, hint: str) -> Exception:
    from quantize.serving.server import ended

    return RuntimeError(what) if log is None else ended(log, what, hint)
