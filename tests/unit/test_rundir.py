"""A run on disk: whose folder it is, what a kill at any moment leaves, and who may write."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantize.errors import UserError
from train.rundir import RunDir, default_name

SETTINGS = {"qat": "int8-int4", "train": {"max_steps": 8}}


def _create(root: Path, name: str = "run", settings: Any = SETTINGS) -> RunDir:
    return RunDir.create(str(root), name, "qat: int8-int4\n", settings)


def test_the_same_settings_open_the_run_again_and_others_do_not(tmp_path: Path) -> None:
    _create(tmp_path).update_manifest(note="kept")
    assert _create(tmp_path).read_json("manifest.json")["note"] == "kept"
    with pytest.raises(UserError, match=r"holds another run; choose another run\.name, or: train --resume"):
        _create(tmp_path, settings={"qat": None})


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="exists and is no run"):
        _create(tmp_path)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


BEGINNINGS: list[dict[str, str]] = [
    {},
    {".manifest.json.tmp": "{"},
    {"manifest.json": '{"stages": {}}', ".config.yaml.tmp": "q"},
    {"manifest.json": '{"stages": {}}', "config.yaml": "qat: null", ".config.resolved.json.tmp": "{"},
]


@pytest.mark.parametrize("files", BEGINNINGS)
def test_a_run_killed_in_its_first_moment_is_begun_again(files: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name, text in files.items():
        (tmp_path / "run" / name).write_text(text)
    assert _create(tmp_path).read_json("manifest.json") == {"stages": {}}


@pytest.mark.parametrize("name", ["config.yaml", "manifest.json"])
def test_a_file_of_the_users_with_one_of_our_names_is_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text('{"mine": 1}')
    with pytest.raises(UserError, match="exists and is no run"):
        _create(tmp_path)
    assert (tmp_path / "run" / name).read_text() == '{"mine": 1}'


def test_a_root_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.root: .*file/run cannot be written"):
        _create(tmp_path / "file")


def test_a_read_only_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\); choose another run\.root"):
        _create(tmp_path)


def test_a_run_is_found_by_name_and_path_and_near_names_are_offered(tmp_path: Path) -> None:
    made = _create(tmp_path, "long-run")
    assert RunDir.open("long-run", str(tmp_path)).path == made.path == RunDir.open(str(made.path), "elsewhere").path
    with pytest.raises(UserError, match=r"no such run, .*did you mean long-run"):
        RunDir.open("long-rum", str(tmp_path))


def test_the_resume_command_can_be_pasted(tmp_path: Path) -> None:
    run = _create(tmp_path / "my runs")
    assert run.resume_command == f"train --resume '{tmp_path}/my runs/run'"


def test_a_stage_is_done_only_with_the_same_inputs(tmp_path: Path) -> None:
    run = _create(tmp_path)
    run.stage_start("fit", "abc")
    assert run.stage_done("fit", "abc") is None
    run.stage_finish("fit", "abc", 1.5, {"loss": 2.0})
    assert run.stage_done("fit", "abc") == {"loss": 2.0}
    assert run.stage_done("fit", "abd") is None


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    run = _create(tmp_path)
    with run.commit_folder(run.path / "merged") as folder:
        (folder / "a").write_text("old")

    def break_off() -> None:
        with run.commit_folder(run.path / "merged") as folder:
            (folder / "a").write_text("half of the new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        break_off()
    assert (run.path / "merged" / "a").read_text() == "old"
    assert not (run.path / "merged.partial").exists()


def test_a_file_is_never_half_written(tmp_path: Path) -> None:
    run = _create(tmp_path)
    run.write_json("metrics.json", {"loss": 1.0})
    with pytest.raises(ValueError):
        run.write_json("metrics.json", {"loss": float("nan")})
    assert json.loads((run.path / "metrics.json").read_text()) == {"loss": 1.0}


def test_one_process_at_a_time(tmp_path: Path) -> None:
    run = _create(tmp_path)
    script = (
        "import fcntl, sys; s = open(sys.argv[1], 'w'); fcntl.flock(s, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    command = [sys.executable, "-c", script, str(run.path / ".lock")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "1\n"
        with pytest.raises(UserError, match="in use by another process"), run.lock():
            pass
    finally:
        holder.communicate("\n")
    with run.lock():
        pass


def test_too_little_disk_is_told_with_numbers(tmp_path: Path) -> None:
    run = _create(tmp_path)
    run.check_disk(1)
    with pytest.raises(UserError, match=r"this run needs about 1048576\.0 GiB"):
        run.check_disk(1 << 50)


def test_losses_survive_a_cut_line_and_repeated_steps(tmp_path: Path) -> None:
    run = _create(tmp_path)
    lines = [
        {"kind": "step", "arm": "tuned", "step": 1, "loss": 3.0},
        {"kind": "step", "arm": "tuned", "step": 2, "loss": 2.0},
        {"kind": "step", "arm": "control", "step": 1, "loss": 9.0},
        {"kind": "step", "arm": "tuned", "step": 2, "loss": 2.5},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "step", "arm": "tuned", "st'
    (run.path / "events.jsonl").write_text(text)
    assert run.training_losses("tuned") == [(1, 3.0), (2, 2.5)]


def test_the_default_name_tells_config_and_settings() -> None:
    first, second = default_name("sft", SETTINGS), default_name("sft", {"qat": None})
    assert "_sft_" in first and first.rsplit("_", 1)[1] != second.rsplit("_", 1)[1]
