"""`eval.engine`: what is refused before anything is loaded, what decides that results are reused, and what is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_vllm import make_environment

from quantize.compare_findings import arithmetic
from quantize.doctor.machine import Gpu
from quantize.errors import UserError
from quantize.evidence import _how_run
from quantize.finish import _check_engine
from quantize.folder_eval.models import Asked, Plan, _with_engine
from quantize.folder_eval.sources import Model
from quantize.folder_eval.study import evaluate
from quantize.folder_eval.work import _stored_rows, measure
from quantize.jobs import Jobs
from quantize.run_report import _task_settings, _versions
from quantize.schemes import SCHEMES
from quantize.serving import engine
from quantize.tasks import Row, save_rows
from train.config_loading import load_config
from train.evaluations import Evaluations
from train.inputs import missing_inputs
from train.plan import estimate
from train.stage_log import Format
from train.stages import Stages

TASKS = "--eval.tasks=examples/tasks/choices.yaml"
VLLM = "--eval.engine=vllm"
FOUND = {"name": "vllm", "version": "0.23.0", "packages": {"vllm": "0.23.0", "torchao": "0.18.0"}}
T4 = Gpu("T4", "7.5", 16.0, "580.95.05")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a GPU and vLLM."""
    monkeypatch.setenv("ONGRID_VLLM", str(make_environment(tmp_path / "env")))
    monkeypatch.setattr(engine, "has_nvidia_driver", lambda: True)
    return tmp_path / "env"


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONGRID_VLLM", str(tmp_path / "none"))
    monkeypatch.setattr(engine, "has_nvidia_driver", lambda: False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((VLLM,), "eval.engine=vllm runs the tasks, and eval.tasks names none"),
        ((VLLM, TASKS, "--eval.task-batch-size=4"), "eval.task_batch_size=4: vLLM chooses its own batches"),
    ],
)
def test_settings_that_change_nothing_are_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_config("tiny.yaml", words)


def test_all_that_vllm_lacks_is_said_at_once_before_a_run_and_by_a_plan(nowhere: None) -> None:
    config = load_config("tiny.yaml", (VLLM, TASKS, "--qat=int8-int4"))
    lines = missing_inputs(config)
    assert len(lines) == 3
    assert lines[0].startswith("eval.engine=vllm: vLLM does not run int8-int4 for cpu") and "transformers" in lines[0]
    assert "none/bin/vllm is not there" in lines[1] and "quantize serve --setup" in lines[1]
    assert "needs an NVIDIA GPU, and no driver was found" in lines[2]
    assert list(estimate(config).obstacles) == lines


def test_a_format_that_it_loads_is_no_obstacle(here: Path) -> None:
    config = load_config("tiny.yaml", (VLLM, TASKS, "--qat=int4", "--quantize.target=cuda-sm80"))
    assert missing_inputs(config) == [] == list(estimate(config).obstacles)
    steps = {step.name: step.text for step in estimate(config).steps}
    assert steps["benchmarks"].endswith("in vLLM")
    with pytest.raises(UserError, match=r"int8 for cpu .*; set quantize\.target=cuda, or run the tasks with"):
        engine.refuse_unserved(SCHEMES["int8"], [SCHEMES["int8"].targets["cpu"]])


def test_transformers_is_asked_for_nothing_new(nowhere: None) -> None:
    assert missing_inputs(load_config("tiny.yaml", (TASKS, "--qat=int8-int4"))) == []
    assert engine.find_engine("transformers") is None


def _jobs(found: dict[str, Any] | None) -> Jobs:
    return Jobs(
        run=Path("run"), format=None, dtype="float32", plain_dtype="float32", batch_size=1, trust_remote_code=False,
        inside=False, tasks={"names": ["x"]}, chat_template=None, cost_batches=(), engine=found,
    )  # fmt: skip


def test_jobs_of_transformers_are_what_they_were_and_those_of_vllm_name_its_version(here: Path) -> None:
    found = engine.find_engine("vllm")
    assert found == FOUND
    assert "engine" not in _jobs(None).check_tasks(Path("m")) and "engine" not in _jobs(None).task_settings()
    assert _jobs(found).check_tasks(Path("m"))["engine"] == found
    assert _jobs(found).benchmark({"model": "m"}, Path("rows"))["engine"] == found


def test_another_vllm_than_that_of_the_other_arms_is_refused(here: Path) -> None:
    assert engine.find_same(FOUND).version == "0.23.0"
    with pytest.raises(UserError, match=r"holds vllm 0\.23\.0, torchao 0\.18\.0, and the other arms' .* vllm 0\.22\.0"):
        engine.find_same(FOUND | {"version": "0.22.0", "packages": {"vllm": "0.22.0"}})


def test_the_report_says_what_ran_the_tasks() -> None:
    gathered = {"tasks": {"limit": 5}, "engine": FOUND, "versions": {"torchao": "0.18.1"}}
    assert _versions(gathered) == {"torchao": "0.18.1", "vllm": "0.23.0", "torchao, beside vLLM": "0.18.0"}
    told = _task_settings(gathered)
    assert told == {"limit": 5, "engine": "vLLM 0.23.0"}
    assert _task_settings({"tasks": {"limit": 5}}) == {"limit": 5}
    assert _how_run(told, {}) == ", the models served by vLLM 0.23.0, at most 5 samples of each"


def test_runs_whose_tasks_ran_in_two_engines_are_told_apart() -> None:
    def run(tasks: str | None) -> Any:
        place = {"dtype": "bfloat16", "device": "GPU", **({"tasks": tasks} if tasks else {})}
        return SimpleNamespace(place=place, tasks=["row"])

    assert arithmetic([run(None), run(None)]) == "" == arithmetic([run("vLLM 0.23.0"), run("vLLM 0.23.0")])
    assert "engine of the tasks (transformers; vLLM 0.23.0)" in arithmetic([run(None), run("vLLM 0.23.0")])
    assert arithmetic([run("vLLM 0.23.0"), SimpleNamespace(place=run(None).place, tasks=[])]) == ""


def test_what_ships_must_run_here_and_in_vllm_before_anything_is_trained(here: Path) -> None:
    config = load_config("tiny.yaml", (VLLM, TASKS, "--qat=int4", "--quantize.target=cuda-sm80"))
    scheme = SCHEMES["int4"]
    target = scheme.targets["cuda-sm80"]
    missing = SimpleNamespace(config=config, format=Format(scheme, target, 32, (), ("a CUDA GPU",)))
    with pytest.raises(
        UserError, match=r"what ships cannot be run here: this machine lacks a CUDA GPU; set eval\.engine"
    ):
        Stages._engine(missing)  # type: ignore[arg-type]
    runs = SimpleNamespace(config=config, format=Format(scheme, target, 32, (), ()), plain_dtype="bfloat16")
    assert Stages._engine(runs) == FOUND  # type: ignore[arg-type]
    _check_engine(_jobs(FOUND), scheme, target)
    with pytest.raises(UserError, match="vLLM does not run int8 for cpu"):  # a run that is finished for that
        _check_engine(_jobs(FOUND), SCHEMES["int8"], SCHEMES["int8"].targets["cpu"])


def test_a_gpu_that_is_too_old_is_refused_before_anything_is_trained(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("tiny.yaml", (VLLM, TASKS, "--qat=int8", "--quantize.target=cuda"))
    form = Format(SCHEMES["int8"], SCHEMES["int8"].targets["cuda"], None, (), ())
    run = SimpleNamespace(config=config, format=form, plain_dtype="float16")
    monkeypatch.setattr(engine, "find_gpu", lambda: T4)
    assert Stages._engine(run) == FOUND  # type: ignore[arg-type]
    run.plain_dtype = "bfloat16"
    with pytest.raises(
        UserError, match=r"16-bit models compute in bfloat16 .* 8\.0 or newer, and T4 has 7\.5; run the"
    ):
        Stages._engine(run)  # type: ignore[arg-type]
    monkeypatch.setattr(engine, "find_gpu", lambda: replace(T4, name="V100", capability="7.0"))
    run.plain_dtype = "float16"
    with pytest.raises(UserError, match=r"what ships is int8 for cuda, which needs .* V100 has 7\.0.*transformers"):
        Stages._engine(run)  # type: ignore[arg-type]


def test_a_driver_that_is_too_old_is_said_before_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_environment(tmp_path / "env", further=("nvidia-cuda-runtime==13.0.96",))
    monkeypatch.setenv("ONGRID_VLLM", str(made))
    monkeypatch.setattr(engine, "has_nvidia_driver", lambda: True)
    monkeypatch.setattr(engine, "find_gpu", lambda: replace(T4, driver="570.86.10"))
    with pytest.raises(UserError, match=r"^eval\.engine=vllm: the NVIDIA driver is 570\.86\.10, .* needs 580 or newer"):
        engine.find_engine("vllm")
    monkeypatch.setattr(engine, "find_gpu", lambda: T4)
    assert engine.find_engine("vllm") == FOUND


def test_tasks_that_end_a_run_say_how_it_goes_on(tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise UserError("no memory")

    directory = SimpleNamespace(path=tmp_path, resume_command="train --resume X")
    run = SimpleNamespace(
        task_key="key", jobs=_jobs(FOUND), stages=SimpleNamespace(directory=directory),
        log=SimpleNamespace(jobs=fail, run=lambda name, key, work, makes: work()),
    )  # fmt: skip
    with pytest.raises(UserError) as found:
        Evaluations._benchmark(run, {"name": "tuned", "may_overflow": False}, "key")  # type: ignore[arg-type]
    assert list(found.value.lines) == ["no memory", "what there is so far is kept; continue with: train --resume X"]


def test_eval_refuses_every_model_that_vllm_would_before_one_is_measured(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = []
    for name, beside in (("one", "pytorch_model.bin"), ("two", "model.safetensors")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "qwen3"}')
        (tmp_path / name / beside).write_bytes((2).to_bytes(8, "little") + b"{}")
        models.append(Model(id=name, name=name, folder=tmp_path / name, dtype="bfloat16", computes_in="bfloat16"))
    plan = Plan(
        title="x", model=replace(models[0], id="model"), references=models[1:], data=tmp_path / "none", samples=1,
        output=tmp_path, engine=FOUND,
    )  # fmt: skip
    with pytest.raises(UserError) as found:
        measure(plan, None, tmp_path)
    one, two = found.value.lines
    assert one.startswith(f"eval.engine=vllm: {tmp_path / 'one'} has no model.safetensors")
    assert two.startswith(f"eval.engine=vllm: {tmp_path / 'two'} has no tokenizer")
    (tmp_path / "two" / "tokenizer.json").write_text("{}")
    engine.check_folders(FOUND, {tmp_path / "two": "bfloat16"})
    monkeypatch.setattr(engine, "find_gpu", lambda: T4)
    engine.check_folders(FOUND, {tmp_path / "two": "float16"})
    with pytest.raises(UserError, match=r"T4 has 7\.5"):
        engine.check_folders(FOUND, {tmp_path / "two": "bfloat16"})


def test_eval_pairs_nothing_with_results_of_a_run_in_the_other_engine(here: Path, tmp_path: Path) -> None:
    row = Row("x", "x", 0, "h", "acc", 1.0, 1.0, True, "p", "t", "r")
    base = Model(id="base", name="base", folder=tmp_path, dtype=None, computes_in="float32", stored=tmp_path)
    save_rows([row], tmp_path / "eval" / "base.tasks.parquet")
    plan = Plan(
        title="run", model=replace(base, stored=None), references=[base], data=tmp_path, samples=1, output=tmp_path,
        run_engine=FOUND,
    )  # fmt: skip
    own = _with_engine(plan, Asked(source="run", tasks=["x"]))  # that of the run
    assert own.engine == FOUND and not own.notes and list(_stored_rows(own, [row])) == ["base"]
    other = _with_engine(plan, Asked(source="run", tasks=["x"], engine="transformers"))
    assert other.engine is None and _stored_rows(other, [row]) == {}
    assert other.notes == [
        "Tasks run in transformers here, in vLLM 0.23.0 in the run: with its arms they make no pairs."
    ]
    simulated = replace(plan, model=replace(base, simulate={"scheme": "int8"}))
    with pytest.raises(UserError, match="vLLM runs no simulation"):
        _with_engine(simulated, Asked(source="run", tasks=["x"]))


def test_an_engine_without_tasks_is_refused_by_eval(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--engine vllm runs tasks, and --tasks names none"):
        evaluate(Asked(source=str(tmp_path), engine="vllm"))


def test_a_server_ends_when_its_starter_is_killed_outright(here: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64}')
    code = (
        "import sys, time; from pathlib import Path; from quantize.serving.environment import find_vllm\n"
        "from quantize.serving.server import serving\n"
        f"with serving(Path({str(tmp_path)!r}), find_vllm(), log=Path({str(tmp_path / 'log')!r})):\n"
        "    print('up', flush=True); time.sleep(60)\n"
    )
    environment = {**os.environ, "FAKE_VLLM": "idle"}  # it loads no model
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert starter.stdout is not None and starter.stdout.readline() == "up\n"
    worker = int((tmp_path / "log").read_text().split("with worker ")[1].split()[0])
    group = os.getpgid(worker)
    starter.kill()
    starter.wait()
    until = time.monotonic() + 15
    while time.monotonic() < until and _lives(worker):
        time.sleep(0.1)
    assert not _lives(worker), os.killpg(group, signal.SIGKILL)


def _lives(process: int) -> bool:
    """Whether it is there and no zombie."""
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
