"""`quantize`: where it looked for what it did not find, and outputs that cannot be written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantize.cli import _parser, main
from quantize.commands import EXAMPLES, VERBS
from quantize.errors import UserError
from quantize.files import make_folder, writing_to
from quantize.schemes import find_scheme


@pytest.mark.parametrize("verb", ["convert", "sensitivity", "compare"])
def test_what_is_not_found_names_the_places(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "nope", "--root", "some/runs"]) == 2
    error = capsys.readouterr().err
    assert "nope is neither a run nor a folder" in error
    assert error.rstrip().endswith("there is none at nope and some/runs/nope (--root)")


@pytest.mark.parametrize("output", ["file/x", "file/x/y", "file"])
def test_a_file_in_the_way_of_a_conversion_is_exit_2(
    output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    command = ["convert", str(tmp_path / "model"), "--scheme", "int8-int4", "--target", "cpu"]
    assert main([*command, "--output", str(tmp_path / output)]) == 2
    said = f"error: --output {tmp_path / output} cannot be written ({tmp_path / 'file'} is a file, not a folder); name "
    assert capsys.readouterr().err.startswith(said)
    assert (tmp_path / "file").read_text() == "mine" and sorted(os.listdir(tmp_path)) == ["file", "model"]


def test_a_folder_without_rights_is_said_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(
        UserError, match=r"--output .*page cannot be written \(Permission denied\); name another folder"
    ):
        make_folder(tmp_path / "page")


def test_what_fails_while_writing_names_option_and_file(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "page" / "report.md"))
    (tmp_path / "page").mkdir()
    said = r"--output .*page cannot be written \(.*report\.md: No space left on device\)"
    with pytest.raises(UserError, match=said), writing_to(tmp_path / "page"):
        raise full


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "runs/a/report.md"), 2),
        (OSError(errno.ENOSPC, "No space left on device", "runs/a/report.md"), 2),
        (OSError(errno.EIO, "Input/output error", "runs/a/report.md"), 1),
        (OSError("something of ours"), 1),
    ],
)
def test_rights_and_full_disks_anywhere_are_the_users(
    error: OSError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: object) -> None:
        raise error

    monkeypatch.setattr("quantize.commands.schemes.run", fail)
    assert main(["schemes"]) == code
    said = capsys.readouterr().err
    assert said == f"error: runs/a/report.md: {error.strerror}\n" if error.filename else "something of ours" in said


def test_without_a_verb_the_verbs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    said = capsys.readouterr().err
    assert all(f"\n    {name}" in said for name in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verbs_help_says_what_it_does_with_an_example_that_parses(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert " ".join(VERBS[verb].SUMMARY.split())[1:] in said
    assert said.endswith(f"example: {EXAMPLES[verb]}")
    words = EXAMPLES[verb].partition(" > ")[0].split()
    assert _parser().parse_args(words[1:]).verb == verb


def test_a_reader_that_stops_is_no_error() -> None:
    command = [sys.executable, "-m", "quantize", "schemes"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("ongrid ")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("int4-int8", "int8-int4"), ("INT8_INT4", "int8-int4"), ("w4a16", "int4"), ("fp8-fp8", "fp8"), ("int44", "int4")],
)
def test_a_schemes_other_names_are_understood(typed: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"did you mean {meant}\\?"):
        find_scheme(typed)
