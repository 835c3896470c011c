"""When fake quantisation starts, whom it follows, and that a stop at any step changes nothing of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import fit_config, fitted, never_started_is_never_inserted
from tiny_models import IDS, gradients, logits_of, tiny_model, with_lora

import train.fit
from qat.distill import Teacher, adapter_weights, answer_divergence
from qat.prepare import prepare_qat
from qat.schedule import Schedule
from quantize.errors import UserError
from train.fit import last_checkpoint, save_adapter


@pytest.mark.parametrize(
    ("start", "steps", "first"),
    [
        (0, 10, 0),
        (3, 10, 3),
        (0.5, 10, 5),
        (0.25, 10, 3),
        (0.99, 10, 9),
        (0.07, 100, 7),
        (0.56, 100, 56),
        (12, 10, None),
    ],
)
def test_a_start_is_a_step_or_a_share_of_all(start: float, steps: int, first: int | None, tmp_path: Path) -> None:
    prepared = prepare_qat(with_lora(tiny_model()), "int3", enabled=start == 0)
    schedule = Schedule(None, prepared, start=start, folder=tmp_path)
    found = []
    for step in range(steps + 1):
        schedule.before_step(step, steps)
        found.append(prepared.enabled)
    assert found == [first is not None and step >= first for step in range(steps + 1)]


def test_a_switch_is_told_once(tmp_path: Path) -> None:
    prepared = prepare_qat(with_lora(tiny_model()), "int3", enabled=False)
    schedule = Schedule(None, prepared, start=2, folder=tmp_path)
    assert [schedule.before_step(step, 5) for step in range(5)] == [False, False, True, False, False]


@pytest.mark.parametrize("ranges", ["minmax", "mse"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_trial_leaves_no_trace(ranges: str, fails: bool) -> None:
    model = with_lora(tiny_model())
    before = logits_of(model)
    prepared = prepare_qat(model, "int3", ranges=ranges, enabled=False)
    with pytest.raises(ValueError) if fails else nullcontext(), prepared.trial():
        assert prepared.enabled and not torch.equal(logits_of(model), before) and not prepared.silent()
        if fails:
            raise ValueError
    assert not prepared.enabled and not prepared.ranges_chosen and len(prepared.silent()) == len(prepared.layers)
    assert torch.equal(logits_of(model), before)


def test_a_trial_of_what_is_on_leaves_it_on() -> None:
    model = with_lora(tiny_model())
    prepared = prepare_qat(model, "int3")
    logits_of(model)
    counts = prepared.calls.copy()
    with prepared.trial():
        logits_of(model)
    assert prepared.enabled and prepared.calls == counts


# ---------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fits")


def test_qat_that_never_starts_is_qat_that_was_never_inserted(home: Path) -> None:
    never_started_is_never_inserted("peft", home)


@pytest.mark.slow
def test_so_it_is_with_unsloth(home: Path) -> None:
    tests = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "fitting", "unsloth", str(home)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, cwd=home)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


def test_until_the_start_it_trains_in_16_bit(home: Path) -> None:
    plain = fitted(fit_config(), home / "plain", qat=False)
    delayed = fitted(fit_config(start=3), home / "step")
    assert delayed.losses[:3] == plain.losses[:3] and delayed.losses[3] != plain.losses[3]
    share = fitted(fit_config(start=0.5), home / "share")
    assert share.losses == delayed.losses and _equal(share.adapter, delayed.adapter)


SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "mse and learned": {"ranges": "mse", "learned_scales": True},
    "everything": {"ranges": "mse", "learned_scales": True, "distill": 0.5},
}


@pytest.mark.parametrize("switches", SWITCHES)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(switches: str, home: Path) -> None:
    config = fit_config(start=3, **SWITCHES[switches])
    whole = fitted(config, home / f"whole {switches}")
    assert whole.finished
    for stop_after in (2, 3, 4):  # within the delay, at the switch, after it
        folder = home / f"stopped {switches} {stop_after}"
        assert not fitted(config, folder, stop_after=stop_after).finished
        resumed = fitted(config, folder)
        assert resumed.finished and resumed.losses == whole.losses[stop_after:]
        assert _equal(resumed.adapter, whole.adapter), f"stopped after {stop_after}"


def test_the_first_half_is_16_bit_unless_asked_otherwise(home: Path) -> None:
    plain = fitted(fit_config(), home / "16 bit", qat=False)
    run, half = fitted(fit_config(), home / "default"), fitted(fit_config(start=0.5), home / "half")
    assert run.losses == half.losses and run.losses[:3] == plain.losses[:3] and _equal(run.adapter, half.adapter)
    at_once = fitted(fit_config(start=0), home / "at once")
    assert at_once.losses[0] != plain.losses[0]
    outside = fitted(fit_config(placement="outside"), home / "outside")
    assert outside.losses[0] != plain.losses[0], "peers' method begins at once"


def test_what_fails_at_the_start_fails_before_the_first_step(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat.prepare.Prepared.silent", lambda self: list(self.layers)[:1])
    steps: list[int] = []
    monkeypatch.setattr("qat.schedule.Schedule.before_step", lambda *arguments: steps.append(1))
    with pytest.raises(UserError, match=r"1 fake-quantised layers never ran, the first is model\.layers\.0"):
        fitted(fit_config(start=4), home / "silent")
    assert not steps


def test_the_trainer_is_made_under_the_backends_settings(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Unsloth turns autocast on while the trainer is made, unless its variable says otherwise (seen on CUDA).
    held: list[str] = []
    make = train.fit.build_trainer

    @contextmanager
    def computing(self: Any, names: Any, *, dtype: str, logits: bool = False) -> Iterator[None]:
        held.append(dtype)
        yield
        held.pop()

    def build(*arguments: Any) -> Any:
        assert held == ["float32"]
        return make(*arguments)

    monkeypatch.setattr("train.backends.peft.PeftBackend.computing", computing)
    monkeypatch.setattr("train.fit.build_trainer", build)
    assert fitted(fit_config(), home / "settings").finished


def test_a_start_behind_the_end_is_refused_before_the_first_step(home: Path) -> None:
    with pytest.raises(UserError, match=r"fake_quant\.start=6 would never be reached: the fine-tuning has 6 steps"):
        fitted(fit_config(start=6), home / "too late")
    assert last_checkpoint(home / "too late") is None


def test_a_checkpoint_that_was_cut_short_is_passed_over(home: Path) -> None:
    config = fit_config(ranges="mse", learned_scales=True)
    config = config.model_copy(update={"train": config.train.model_copy(update={"save_steps": 2})})
    whole = fitted(config, home / "whole, saved")
    folder = home / "cut short"
    assert not fitted(config, folder, stop_after=4).finished
    for name in ("range_factors.safetensors", "complete"):  # killed before they were written
        (folder / "checkpoint-4" / name).unlink()
    resumed = fitted(config, folder)
    assert resumed.losses == whole.losses[2:] and _equal(resumed.adapter, whole.adapter)


def test_ranges_are_chosen_of_the_weights_at_the_start(home: Path) -> None:
    delayed = fitted(fit_config(start=5, ranges="mse", lora={"lora_alpha": 64}), home / "late mse", stop_after=5)
    at_start = _factors_of(delayed, "mse")
    begun = fitted(fit_config(start=5, ranges="mse", lora={"lora_alpha": 64}), home / "late mse")
    assert _equal({name: factor.detach() for name, factor in begun.learner.prepared.factors.items()}, at_start)
    at_once = fitted(fit_config(start=0, ranges="mse", lora={"lora_alpha": 64}), home / "early mse")
    assert not _equal(at_once.learner.prepared.factors, at_start), "the case is meant to tell them apart"


def test_learned_ranges_move(home: Path) -> None:
    run = fitted(fit_config(learned_scales=True, scale_learning_rate=1e-2), home / "learned")
    factors = run.learner.prepared.factors
    assert factors.keys() == set(run.learner.prepared.coverage.layers)
    assert all((factor != 1).any() for factor in factors.values())


def test_it_goes_on_from_the_finished_16_bit_adapter(home: Path) -> None:
    control = fitted(fit_config(), home / "control", qat=False)
    save_adapter(control.learner, home / "control adapter")
    config = fit_config(start=5, initial="control")  # its first loss is the finished adapter's in 16 bit
    more = fitted(config, home / "more", adapter=home / "control adapter")
    assert more.losses[0] < control.losses[0]
    config = fit_config(initial="control", distill=0.5, teacher="control")
    run = fitted(config, home / "follows", adapter=home / "control adapter", teacher=home / "control adapter")
    assert run.finished and not _equal(run.adapter, control.adapter)


def _factors_of(run: Any, ranges: str) -> dict[str, Any]:
    """The factors that are chosen of the weights that the run has now."""
    run.learner.prepared.switch_off()
    fresh = prepare_qat(run.learner.model, "int3", group_size=32, ranges=ranges, dtype=torch.float32)
    found = {name: factor.detach().clone() for name, factor in fresh.factors.items()}
    fresh.switch_off()
    return found


def _equal(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---------------------------------------------------------------------- distillation


@pytest.mark.parametrize("count", [None, 7, torch.tensor(40)])
def test_divergence_is_kl_on_the_answers(count: Any) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 9, 11, requires_grad=True), torch.randn(3, 9, 11) * 2
    labels = torch.randint(0, 11, (3, 9))
    labels[:, :4], labels[1] = -100, -100
    twin = student.detach().clone().requires_grad_()
    value = answer_divergence(student, teacher, labels, count)
    value.backward()
    expected, answers = torch.zeros(()), 0
    for row in range(3):
        for position in range(8):  # position t predicts token t + 1
            if labels[row, position + 1] != -100:
                p, q = teacher[row, position].softmax(0), twin[row, position].softmax(0)
                expected, answers = expected + (p * (p.log() - q.log())).sum(), answers + 1
    expected = expected / (answers if count is None else count)
    expected.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(student.grad, twin.grad, rtol=1e-4, atol=1e-7)
    assert answer_divergence(student, student.detach(), labels, None).abs() < 1e-6


@pytest.mark.parametrize("whom", ["start", "control", "base"])
def test_the_teacher_is_the_16_bit_model_and_leaves_the_student_alone(whom: str, tmp_path: Path) -> None:
    model = with_lora(tiny_model(), lora_dropout=0.3)
    adapter = None
    if whom == "start":
        wanted = logits_of(model)
    elif whom == "control":
        other = with_lora(tiny_model(), seed=9)
        wanted, adapter = logits_of(other), adapter_weights(other)
    else:
        wanted, adapter = logits_of(tiny_model()), {}
    prepared = prepare_qat(model, "int3", learned_scales=True)
    schedule = Schedule(model, prepared, start=0, distill=0.5, adapter=adapter, folder=tmp_path)
    schedule.before_step(0, 10)
    assert schedule.teacher is not None
    with torch.no_grad():  # the student goes on
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    before, grads = logits_of(model), gradients(model)
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    model.train()
    labels = IDS.clone()
    given = schedule.teacher.logits({"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": labels})
    assert model.training and not given.requires_grad
    model.eval()
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5)
    assert prepared.enabled and torch.equal(before, logits_of(model))
    assert pointers == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    after = gradients(model)
    assert grads.keys() == after.keys() and all(torch.equal(grads[name], after[name]) for name in grads)


def test_a_teacher_that_fails_gives_the_student_back() -> None:
    model = with_lora(tiny_model()).train()
    prepared = prepare_qat(model, "int3")
    before = adapter_weights(model)

    def fail(module: Any, arguments: Any) -> None:
        raise MemoryError

    handle = model.base_model.model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        Teacher(model, prepared, {}).logits({"input_ids": IDS})
    handle.remove()
    assert prepared.enabled and model.training
    assert all(torch.equal(weight, before[name]) for name, weight in adapter_weights(model).items())
