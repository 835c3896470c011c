"""What vLLM and transformers agree on, in numbers made here."""

from __future__ import annotations

import math

import pytest

from quantize.errors import UserError
from quantize.serving.agreement import Difference, _compared, _refuse_longer, describe
from quantize.serving.client import Completion, Score

PLAIN = {
    "ids": [[5, 6, 7, 8]] * 8, "masks": [[0, 0, 1, 1]] * 8, "nll": [2.0] * 8, "counts": [2] * 8,
    "greedy_answers": [[7, 9]] * 8, "floor_nll": [2.02] * 8, "floor_top1": [1] * 8,
    "prompts": [[5, 6]] * 8, "greedy": [[1, 2, 3]] * 8, "margins": [[1.0, 0.01, 2.0]] * 8, "seconds": [[4, 5, 6]] * 8,
}  # fmt: skip


def scores(nats: float) -> list[Score]:
    """The first token is the prompt's, and not scored."""
    return [Score([-50.0, -nats, -nats], [6, 7, 8], [0.0] * 3)] * 8


def completions(*tokens: list[int]) -> list[Completion]:
    return [Completion(each, "", "length") for each in (*tokens, *[[1, 2, 3]] * (8 - len(tokens)))]


def test_equal_ones() -> None:
    found = _compared(PLAIN, scores(1.0), completions(), 3)
    assert (found.transformers, found.vllm, found.gap.value, found.fault) == (1.0, 1.0, 0.0, None)
    assert (found.equal, found.differences) == (24, ())
    assert found.same == 0.5  # 7 is in both, 8 is not 9
    assert "all 3 equal after 8 of 8 prompts; 100.0% of all tokens" in describe(found)[3]


def test_the_first_difference_has_its_margin() -> None:
    found = _compared(PLAIN, scores(1.01), completions([1, 5, 3], [0, 2, 3]), 3)
    assert found.differences == (Difference(1, 0.01, True), Difference(0, 1.0, False))
    assert found.equal == 24 - 2 - 3
    assert math.isclose(found.gap.value, 0.01) and found.fault is None
    *_, greedy, parted = describe(found)
    assert "all 3 equal after 6 of 8 prompts; 79.2% of all tokens" in greedy
    assert parted.endswith("1.0000 at most), and vLLM took that second in 1 of 2")


def test_another_model_is_a_fault() -> None:
    found = _compared(PLAIN, scores(1.2), completions(), 3)
    assert found.fault is not None and "+0.2000 [+0.2000, +0.2000] nats a token" in found.fault


def test_a_difference_that_so_few_samples_do_not_show_is_no_fault() -> None:
    some = [*scores(2.2)[:1], *scores(1.0)[:7]]
    found = _compared(PLAIN, some, completions(), 3)
    assert found.gap.value > 0.1 and found.gap.low < 0.05 and found.fault is None


def test_a_last_bit_is_no_fault_whatever_it_makes() -> None:
    found = _compared({**PLAIN, "floor_nll": [2.4] * 8}, scores(1.2), completions(), 3)
    assert math.isclose(found.floor_gap, 0.2) and found.fault is None
    assert "embeddings changed by a last bit: loss +0.2000, the same most likely token at 50.00%" in describe(found)[2]


def test_other_tokens_are_a_fault_at_an_equal_loss() -> None:
    found = _compared({**PLAIN, "floor_top1": [2] * 8}, scores(1.0), completions(), 3)
    assert found.fault is not None and "at 50.00% of the scored ones, where a last bit leaves 100.00%" in found.fault


def test_an_answer_that_is_too_short_is_a_failure_of_ours() -> None:
    with pytest.raises(ValueError):
        _compared(PLAIN, scores(1.0), completions([1]), 3)


def test_what_the_server_has_no_room_for_is_said_before_it_is_asked() -> None:
    _refuse_longer(PLAIN, 3, 5)  # a scored sample of 4 tokens, and one more; a prompt of 2 with 3
    with pytest.raises(UserError, match=r"needs 5 tokens of context, and vLLM serves the model with 4"):
        _refuse_longer(PLAIN, 2, 4)
    with pytest.raises(UserError, match=r"needs 22 tokens .* or fewer --tokens"):
        _refuse_longer(PLAIN, 20, 21)
