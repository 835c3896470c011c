"""lm-eval's tasks on a model that vLLM serves: the same requests as through transformers, token for token.

lm-eval's own client of such servers (`local-completions`) asks for others: it leaves out the token that begins every
text of some models, and takes a token that shares the highest log-probability with another for the greedy one.
"""

from __future__ import annotations

import fcntl
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    chunks,
    configure_pad_token,
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from quantize.errors import UserError
from quantize.files import read_mapping
from quantize.serving import client
from quantize.serving.engine import ASKED, INSTEAD, find_same
from quantize.serving.gpu import check_gpu, find_gpu
from quantize.serving.server import Server, serving
from quantize.task_checks import SERVER_RESERVES, context_length

_AT_ONCE = 1024
"""Requests whose answers are held at a time: each has three numbers for every token of the prompt."""
_CLAMPED = -9999.0
"""What vLLM says in place of a log-probability of minus infinity, which JSON does not have."""
_SERVED = ".served."
_NEUTRAL: dict[str, Any] = {
    "bad_words_ids": [], "begin_suppress_tokens": [], "constraints": [], "exponential_decay_length_penalty": None,
    "force_words_ids": [], "forced_bos_token_id": None, "forced_eos_token_id": None, "guidance_scale": 1,
    "min_length": 0, "min_new_tokens": 0, "no_repeat_ngram_size": 0, "num_beams": 1, "penalty_alpha": 0,
    "sequence_bias": {}, "suppress_tokens": [], "watermarking_config": None,
}  # fmt: skip
"""Settings of a model's folder that change what transformers writes when it does not sample, and that a server is not
asked for; each with the value beside None that changes nothing."""


class ServedLM(HFLM):
    """lm-eval's model of transformers without its model: how a request becomes tokens is its own code.

    A scored sequence holds its last token, too, and one more is always written, so the context is shorter than in
    transformers by `SERVER_RESERVES` tokens: what is longer loses that many more at its beginning.

    Args:
        server: serves the model.
        tokenizer: of the model, with the chat template that the prompts are put in.
        context: tokens that the model takes, from `quantize.task_checks.context_length`.
        decoding: what transformers takes from the model's folder when it decodes greedily, in vLLM's words.
    """

    batches_itself = True

    def __init__(self, server: Server, tokenizer: Any, context: int, decoding: Mapping[str, Any]) -> None:
        TemplateLM.__init__(self)  # HFLM's own would load a model
        self.server, self.decoding = server, dict(decoding)
        self.tokenizer = configure_pad_token(tokenizer)
        self.backend, self.truncation = "causal", False
        self.chat_template_args: dict[str, Any] = {}
        self.add_bos_token = self.custom_prefix_token_id = self.enable_thinking = self.think_end_token = None
        self._max_length = context - SERVER_RESERVES
        self.batch_size_per_gpu = _AT_ONCE  # windows of a text
        self.batch_sizes: dict[int, int] = {}

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, override_bs: Any = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, is each token the most likely one) of each answer after its prompt, both as tokens."""
        found: list[tuple[float, bool]] = []
        for some in chunks(requests, _AT_ONCE):
            self._refuse_answer(max(len(scored) for _, _, scored in some))
            sequences = [(before + scored)[-(self._max_length + 1) :] for _, before, scored in some]
            self._refuse_longer(max(map(len, sequences)) + 1)
            scores = client.score(self.server, sequences)
            found += [_result(score, scored) for (_, _, scored), score in zip(some, scores, strict=True)]
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each prompt, up to the first of its stop strings."""
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        found: list[str] = []
        for some in chunks(requests, _AT_ONCE):
            asked = [normalize_gen_kwargs(request.args[1], self.max_gen_toks) for request in some]
            limits = [int(each["max_gen_toks"]) for each in asked]
            stops = [handle_stop_sequences(each["until"], eos=eos) for each in asked]
            prompts = [self._prompt(request.args[0], limit) for request, limit in zip(some, limits, strict=True)]
            self._refuse_longer(max(len(each) + limit for each, limit in zip(prompts, limits, strict=True)))
            # Stop strings may be special tokens ("<|im_end|>"), which a text without those never shows.
            options = {"skip_special_tokens": False, **self.decoding}
            answers = client.complete(
                self.server, prompts, limits, stop=[[each for each in stop if each] for stop in stops], options=options
            )
            found += [
                postprocess_generated_text(self.tok_decode(answer.tokens), stop, None)
                for answer, stop in zip(answers, stops, strict=True)
            ]
        return found

    def _prompt(self, text: str, limit: int) -> list[int]:
        self._refuse_answer(limit + 1)  # with a token of the prompt
        tokens, _ = self.tok_batch_encode([text], left_truncate_len=self._max_length - limit)
        return [int(token) for token in tokens[0]]

    def _refuse_answer(self, tokens: int) -> None:
        """lm-eval's own model has these as assertions; a run was refused by `check_runnable` before."""
        if tokens > self._max_length:
            raise UserError(
                f"{ASKED}: an answer takes {tokens} tokens, and this model's context has {self._max_length}; "
                "leave that task out, or take a model with a longer context"
            )

    def _refuse_longer(self, tokens: int) -> None:
        """A server that has memory for less than the model's context must not cut what transformers would not."""
        if tokens > self.server.max_length:
            raise UserError(
                f"{ASKED}: a request has {tokens} tokens, and vLLM serves this model with "
                f"{self.server.max_length} (its GPU memory or the model's config allows no more): end what else holds "
                f"it (nvidia-smi), or {INSTEAD}"
            )


def _result(score: client.Score, scored: Sequence[int]) -> tuple[float, bool]:
    values = score.logprobs[-len(scored) :]
    total = math.fsum(values) if min(values) > _CLAMPED else -math.inf
    return total, score.argmax[-len(scored) :] == list(scored)


def greedy_decoding(folder: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """What of a model's folder decides its greedy answers in transformers, in vLLM's words: which tokens end one, and
    a penalty on repetition."""
    own = _generation_config(folder, trust_remote_code)
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    return {
        "stop_token_ids": [token for token in ends if token is not None],
        "repetition_penalty": own.repetition_penalty or 1.0,
    }


def refuse_decoding(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Raises UserError where a model's folder asks for more when tokens are written than `greedy_decoding` tells.

    vLLM knows some of it by other names or with another meaning, so that the answers would not be those of
    transformers; nothing of it matters where answers are scored.
    """
    own = _generation_config(folder, trust_remote_code)
    asked = {name: getattr(own, name, None) for name in _NEUTRAL}
    odd = [f"{name}: {value}" for name, value in asked.items() if value not in (None, _NEUTRAL[name])]
    if odd:
        raise UserError(
            f"{ASKED}: {folder}: its generation settings have {', '.join(odd)}, which is not asked of vLLM: "
            "a task that lets the model write would have other answers than in transformers; "
            f"{INSTEAD}, or take that out of generation_config.json"
        )


def _generation_config(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig, GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:  # it has none
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        return GenerationConfig.from_model_config(config)


@contextmanager
def served_lm(
    job: Mapping[str, Any], tokenizer: Any, convert: Callable[[Mapping[str, Any]], Any]
) -> Iterator[ServedLM]:
    """The model of a job (see `quantize.worker_jobs.benchmark`), served by vLLM while the block runs.

    Args:
        job: with `engine`, from `quantize.serving.engine.find_engine`.
        convert: does a job of that kind.

    Raises:
        UserError: vLLM is another one than the job asks for, cannot load the checkpoint, or lacks memory.
    """
    from quantize.serving.check import check_folder

    vllm, trust = find_same(job["engine"]), bool(job.get("trust_remote_code"))
    model, rows = Path(job["model"]), Path(job["task_rows"])
    context = context_length(model, tokenizer, trust_remote_code=trust)
    with _checkpoint(job, rows, convert) as folder:
        checked = check_folder(folder, vllm, chat=False, trust_remote_code=trust)
        if (gpu := find_gpu()) is not None:
            check_gpu(checked, gpu)
        _free_memory()
        # As much of the model's context as memory allows; a request that is longer is refused.
        arguments = [*checked.arguments, "--max-model-len", "auto"]
        quantised = read_mapping(folder / "config.json").get("quantization_config")  # by a known format or not
        arguments += ["--dtype", job["dtype"]] if job.get("dtype") and not quantised else []
        with serving(folder, vllm, log=rows.with_suffix(".vllm.log"), arguments=arguments, hint=INSTEAD) as server:
            yield ServedLM(server, tokenizer, context, greedy_decoding(model, trust_remote_code=trust))


@contextmanager
def _checkpoint(job: Mapping[str, Any], rows: Path, convert: Callable[[Mapping[str, Any]], Any]) -> Iterator[Path]:
    """The folder of a job's model; of one that is simulated elsewhere, really quantised for as long as the block runs.

    It lies beside the results, where there is room for a checkpoint.
    """
    if not job.get("simulate"):
        yield Path(job["model"])
        return
    _remove_left(rows)
    # Not named by the process: on a shared disk another machine may have one of the same number.
    folder = rows.with_name(f"{rows.stem}{_SERVED}{uuid4().hex[:8]}")
    settings = {key: job.get(key) for key in ("dtype", "grid", "trust_remote_code")} | job["simulate"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock_of(folder).open("w") as lock:
        with suppress(OSError):  # a disk that knows no locks: there nothing that is left is removed
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            output = folder / "checkpoint"  # what converts writes beside it first
            convert({"source": job["model"], "output": str(output), **settings})
            yield output
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            _lock_of(folder).unlink(missing_ok=True)


def _lock_of(folder: Path) -> Path:
    """The file that is locked from before a checkpoint is there until after it is gone."""
    return folder.with_name(f"{folder.name}.lock")


def _remove_left(rows: Path) -> None:
    """Removes the checkpoints of processes that were killed, whose locks are free; another run may be at work on the
    same results, on another machine too."""
    for left in rows.parent.glob(f"{rows.stem}{_SERVED}*"):
        if not left.is_dir():
            continue
        with suppress(OSError), _lock_of(left).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
            _lock_of(left).unlink(missing_ok=True)


def _free_memory() -> None:
    """Gives the GPU memory of what this process did before back: the server takes what is free."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
