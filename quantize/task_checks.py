"""What would end or falsify a benchmark hours after it was begun, found before any model runs: no weights are loaded.

Documents are counted from 0, as in a row's `doc_id`.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from numbers import Integral
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from quantize.errors import UserError
from quantize.task_rows import may_be_split

if TYPE_CHECKING:
    from quantize.tasks import Settings


SERVER_RESERVES = 2
"""Tokens by which a server's context is shorter: a scored sequence holds its last token, too, and one is written."""
_GREEDY = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "min_p"}
"""What greedy decoding reads of a task's generation_kwargs, or has no use for."""


def check_kind(name: str, task: Any) -> None:
    """Raises UserError where a task is empty, runs code that the model writes, or needs more than text."""
    if getattr(task, "UNSAFE_CODE", False) or getattr(task.config, "unsafe_code", False):
        raise UserError(f"eval.tasks: {name} runs code that the model writes, which is not done here; leave it out")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"eval.tasks: {name} needs images or sound, and a language model has none; leave it out")
    if not len(task.eval_docs):
        raise UserError(f"eval.tasks: {name} has no samples; look at its test_split and data_files")


def context_length(folder: Path, tokenizer: Any, *, trust_remote_code: bool = False) -> int:
    """The tokens of a model's context that lm-eval will reckon with, from its config."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import resolve_max_length
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    return int(resolve_max_length(config, tokenizer, default=HFLM._DEFAULT_MAX_LENGTH))


def check_runnable(
    tasks: Mapping[str, Mapping[str, Any]], settings: Settings, tokenizer: Any, context: int, *, served: bool = False
) -> dict[str, int]:
    """Looks at the right answer of every sample that is run, and builds all requests that a model would be sent.

    Args:
        tasks: from `load_tasks`; building changes them, so load them anew to run them.
        tokenizer: of the model, with the chat template that the prompts are put in.
        context: tokens that the model takes, from `context_length`.
        served: they will run in vLLM, whose context is shorter by `SERVER_RESERVES`, and which is asked greedily.

    Returns:
        by reported name, how many samples' prompts lm-eval cuts from the left, as they are longer; where none is, no
        entry. Named as in `few_shot_numbers`.

    Raises:
        UserError: one line for each task that cannot be run, with the first document at which it fails.
    """
    lines, cut, lm = [], dict.fromkeys(tasks, 0), _tokeniser(tokenizer)
    context -= SERVER_RESERVES if served else 0
    for name, leaves in tasks.items():
        split = may_be_split(leaves)
        for leaf, task in leaves.items():
            problem = (
                _wrong_answers(task, settings.limit)
                or _unbuildable(task, settings, tokenizer)
                or _empty_request(task, tokenizer)
                or (_not_greedy(task) if served else None)
            )
            documents: set[int] = set()
            if not problem:
                problem, documents = _fit(task, lm, context)
            if problem:
                lines.append(f"eval.tasks: {leaf if leaf == name else f'{name} ({leaf})'} cannot be run: {problem}")
            cut[name] += len(documents)
            if split:
                cut.setdefault(leaf, len(documents))
    if lines:
        raise UserError(*lines)
    return {name: number for name, number in cut.items() if number}


def _wrong_answers(task: Any, limit: int | None) -> str | None:
    """The first document whose right answer is none of its choices: lm-eval calls each answer to it wrong."""
    if not _is_scored_by_choice(task):
        return None
    first, count = None, 0
    for number, document in task.doc_iterator(limit=limit):
        try:
            wrong = _wrong_answer(task, document)
        except Exception:  # whatever its template or code raises; building its request will say it
            return None
        if wrong:
            first, count = first or f"document {number}: {wrong}", count + 1
    return first and first + (f" ({count - 1} other documents have such an answer)" if count > 1 else "")


def _is_scored_by_choice(task: Any) -> bool:
    """Does lm-eval itself look the right answer up among the choices?"""
    from lm_eval.api.task import ConfigurableTask

    own = type(task).process_results is not ConfigurableTask.process_results or callable(task.config.process_results)
    writes = task.OUTPUT_TYPE == "generate_until" and task.config.doc_to_choice is not None
    return not own and (task.OUTPUT_TYPE == "multiple_choice" or writes)


def _wrong_answer(task: Any, document: Mapping[str, Any]) -> str | None:
    key = "doc_to_text" if task.multiple_input else "doc_to_target"
    gold = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    choices = task.doc_to_choice(document)
    if odd := [choice for choice in choices if not isinstance(choice, str)]:
        return f"its choice {odd[0]!r} is no text; doc_to_choice must give texts"
    several = bool(task.multiple_target)
    if several != isinstance(gold, list):
        kinds = ("a list", "not a list") if several else ("not a list", "a list")
        return (
            f"the right answer of document 0 is {kinds[0]}, here ({gold!r}) it is {kinds[1]}; make {key} give one kind"
        )
    only_numbers = several or task.OUTPUT_TYPE == "generate_until"
    if all(_is_choice(each, choices, only_numbers) for each in (gold if several else [gold])):
        return None
    return (
        f"its right answer {gold!r} is none of its {len(choices)} choices {reprlib.repr(choices)}; {key} must give a "
        f"choice's number, counted from 0{'' if only_numbers else ', or its text'} (of a field that counts from 1: "
        '"{{FIELD - 1}}", of letters: "{{\'ABCD\'.index(FIELD)}}")'
    )


def _is_choice(gold: Any, choices: Sequence[str], only_numbers: bool) -> bool:
    if isinstance(gold, Integral):
        return 0 <= int(gold) < len(choices)
    return not only_numbers and gold in choices


def _unbuildable(task: Any, settings: Settings, tokenizer: Any) -> str | None:
    """The first document for which lm-eval can make no request, and why."""

    def build(limit: int | None) -> Exception | None:
        task.set_fewshot_seed(seed=settings.seed)
        try:
            task.build_all_requests(
                limit=limit,
                apply_chat_template=settings.chat_template,
                fewshot_as_multiturn=settings.chat_template,
                chat_template=_chat_template(tokenizer) if settings.chat_template else None,
            )
        except Exception as error:  # whatever the templates of the task and of the model, its code and lm-eval raise
            return error
        return None

    error = build(settings.limit)
    if error is None:
        return None
    works, fails = 0, min(len(task.eval_docs), settings.limit or len(task.eval_docs))
    while fails - works > 1:  # with `works` documents there is no error, with `fails` there is
        middle = (works + fails) // 2
        found = build(middle)
        works, fails, error = (works, middle, found) if found else (middle, fails, error)
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    examples = task.get_config("num_fewshot") or 0
    task.set_config(key="num_fewshot", value=0)
    if examples and build(fails) is None:
        pool = len(getattr(getattr(task, "sampler", None), "df", None) or ())
        own = "" if settings.num_fewshot is not None else "its definition asks for them, "
        return (
            f"document {fails - 1}: lm-eval cannot put {examples} example(s) before it, of the {pool} that the task "
            f"has ({reason}); {own}lower eval.num_fewshot"
        )
    return f"document {fails - 1}: lm-eval cannot make its request ({reason}); look at that document and the templates"


def _chat_template(tokenizer: Any) -> Any:
    """lm-eval's own way to apply it, which leaves the system's turn out where the template has none."""
    from lm_eval.models.huggingface import HFLM

    return partial(HFLM.apply_chat_template, SimpleNamespace(tokenizer=tokenizer, chat_template_args={}))


def _empty_request(task: Any, tokenizer: Any) -> str | None:
    """The first request that holds no token to begin from or none to score, at which lm-eval or the model fails."""
    bare = not tokenizer.encode("")  # else a token that begins every text
    for request in task.instances:
        document, prompt = f"document {request.doc_id}", request.args[0]
        if not isinstance(prompt, str):
            return f"{document}: {prompt!r} is no text; look at doc_to_text and doc_to_target"
        if request.request_type == "loglikelihood":
            answer = request.args[1]
            if not isinstance(answer, str):
                return f"{document}: its answer {answer!r} is no text; doc_to_target must give text"
            if not answer and prompt == prompt.rstrip():  # lm-eval takes spaces at the prompt's end for the answer's
                return f"{document}: an answer is empty, so there is nothing to score; look at doc_to_choice and target"
            if bare and prompt and not prompt.strip():
                return f"{document}: its prompt {prompt!r} holds no more than spaces; look at doc_to_text"
        elif request.request_type == "generate_until" and bare and not prompt:
            return f"{document}: its prompt is empty; look at doc_to_text"
        elif request.request_type == "loglikelihood_rolling" and not prompt.strip():
            return (  # lm-eval: 0 nats over 1 word, the best that there is
                f"{document}: its text is empty, which would score as one that the model knows by heart; drop its line "
                "from the data, or look at doc_to_target"
            )
    return None


def _not_greedy(task: Any) -> str | None:
    """What a task asks of the decoding that a server is not asked for."""
    from lm_eval.models.utils import normalize_gen_kwargs

    for request in task.instances:
        if request.request_type != "generate_until":
            continue
        asked = normalize_gen_kwargs(request.args[1], _NO_LIMIT)
        odd = ["do_sample"] if asked["do_sample"] else sorted(set(asked) - _GREEDY)
        if odd:
            values = ", ".join(f"{name}: {asked[name]}" for name in odd)
            return (
                f"its generation_kwargs ask for {values}, and with eval.engine=vllm answers are the greedy ones; run "
                "it with eval.engine=transformers"
            )
    return None


_NO_LIMIT = 256  # HFLM.max_gen_toks
_ADDED = 8  # special tokens, and the space that some tokenizers put before a text
_ROOM = "leave the task out, or take a model with a longer context"


def _tokeniser(tokenizer: Any) -> Any:
    """lm-eval's model without a model, for its ways to make tokens of a request."""
    from lm_eval.models.huggingface import HFLM

    lm: Any = object.__new__(HFLM)
    lm.tokenizer, lm.backend, lm.enable_thinking = tokenizer, "causal", None
    lm.add_bos_token = lm.custom_prefix_token_id = None
    lm.tok_encode = lru_cache(maxsize=4)(lm.tok_encode)  # a document's choices share their prompt
    lm._loglikelihood_tokens = lambda requests, **options: requests
    return lm


def _at_most(text: str) -> int:
    """More tokens than a text has, without making them: each holds a byte at least, and NFKC makes 11 bytes of one."""
    return _ADDED + (len(text) if text.isascii() else 11 * len(text.encode()))


def _long_pairs(task: Any, lm: Any, context: int) -> Iterator[tuple[int, int, int]]:
    """(document, tokens of its prompt, tokens of its answer) where both may be longer than the context."""
    for request in task.instances:
        if request.request_type != "loglikelihood":
            continue  # a text is read in windows
        prompt, answer = request.args
        if _at_most(prompt) + _at_most(answer) <= context:
            continue
        if prompt and len(lm.tok_encode(prompt)) + _at_most(answer) <= context:
            continue
        ((_, before, scored),) = lm.loglikelihood([request], disable_tqdm=True)
        yield request.doc_id, len(before), len(scored)


def _fit(task: Any, lm: Any, context: int) -> tuple[str | None, set[int]]:
    """Why lm-eval would end at a request that is too long, else the documents whose prompts it cuts unseen."""
    cut: set[int] = set()
    for request in task.instances:
        if request.request_type != "generate_until":
            continue
        prompt, number = request.args[0], _new_tokens(request)
        if number >= context:
            problem = (
                f"it lets the model write {number} tokens (max_gen_toks; {_NO_LIMIT} where the task does not say), and "
                f"this model's context has {context}, with the prompt; set a smaller max_gen_toks in generation_kwargs "
                f"of the task's file, {_ROOM}"
            )
            return problem, set()
        if _at_most(prompt) > context - number and len(lm.tok_encode(prompt)) > context - number:
            cut.add(request.doc_id)
    for document, before, scored in _long_pairs(task, lm, context):
        if scored > context:
            problem = (
                f"document {document}: an answer has {scored} tokens, and this model's context {context}; drop its "
                f"line from the data, {_ROOM}"
            )
            return problem, set()
        if before + scored > context + 1:  # an answer's last token is no input
            cut.add(document)
    return None, cut


def _new_tokens(request: Any) -> int:
    from lm_eval.models.utils import normalize_gen_kwargs

    return int(normalize_gen_kwargs(request.args[1], _NO_LIMIT)["max_gen_toks"])
