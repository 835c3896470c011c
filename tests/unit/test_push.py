"""`quantize push` against an imitation of the hub: equal bytes, failures in a sentence, and never a token in sight."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_imitation import TOKEN, Hub, imitation
from releases import PROJECT, make_folder, make_run, quickstart_metrics

from quantize.cli import main

REPO = "me/tiny-int8"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The imitation, as the hub of this process; a connection that breaks is tried again at once."""
    with imitation() as found:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", found.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "*")
        huggingface_hub.utils.close_session()
        yield found
    huggingface_hub.utils.close_session()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A converted folder with its card, and a file that is nobody's business."""
    record = {"source": "/home/me/models/mine", "scheme": "int8", "target": "cpu", "license": "apache-2.0"}
    made = make_folder(tmp_path / "converted", record)
    assert main(["card", str(made)]) == 0
    (made / "notes.txt").write_text("mine")
    return made


def push(folder: Path, *options: str, repo: str = REPO) -> int:
    return main(["push", str(folder), "--repo", repo, *options])


def sent(hub: Hub, folder: Path, revision: str = "main") -> None:
    """Asserts that the hub holds the files, byte for byte; the card's code loads the repository."""
    files = hub.files[REPO, revision]
    names = {path.name for path in folder.iterdir()} - {"notes.txt"}
    assert files.keys() == names
    record = json.loads((folder / "ongrid.json").read_text())
    public = {**record, "source": "mine"}  # where it lay is nobody's business
    assert json.loads(files["ongrid.json"]) == public and record["source"] == "/home/me/models/mine"
    for name in names - {"README.md", "ongrid.json"}:
        assert files[name] == (folder / name).read_bytes(), name
    card = files["README.md"].decode()
    assert f'model_id = "{REPO}"' in card and str(folder) not in card


def test_equal_bytes_in_one_commit_by_the_environment_alone(folder: Path, tmp_path: Path) -> None:
    with imitation() as hub:
        environment = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
            "HF_DEBUG": "", "NO_PROXY": "*", "PYTHONPATH": str(PROJECT), "HF_HOME": str(tmp_path / "home"),
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "quantize", "push", str(folder), "--repo", REPO, "--debug"],
            capture_output=True, text=True, env=environment, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        sent(hub, folder)
        assert hub.commits == 1 and any("/storage/" in request and "PUT" in request for request in hub.requests)
        assert not [request for request in hub.authorized if "/storage/" in request]  # no token for the storage
    assert f"{hub.url}/{REPO}" in done.stdout and "not uploaded: notes.txt" in done.stdout
    assert TOKEN not in done.stdout + done.stderr


def test_large_files_go_in_parts_onto_a_branch_and_again(hub: Hub, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(os.urandom(3 * 4096 + 5))
    assert push(folder, "--revision", "v1") == 0
    sent(hub, folder, "v1")
    assert hub.files[REPO, "main"] == {}
    (folder / "tokenizer_config.json").write_text('{"a": 1}')
    before = len(hub.requests)
    assert push(folder, "--revision", "v1") == 0  # a repository that is there: a new commit, nothing large again
    sent(hub, folder, "v1")
    assert hub.commits == 2 and not [request for request in hub.requests[before:] if request.startswith("PUT")]


def test_a_name_without_an_owner_is_ones_own(hub: Hub, folder: Path) -> None:
    assert push(folder, "--private", repo="tiny-int8") == 0
    sent(hub, folder)
    assert hub.private[REPO]


def test_private_is_refused_where_the_repository_is_public(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(folder) == 0
    assert push(folder, "--private") == 2
    assert "exists and is public" in capsys.readouterr().err
    assert hub.commits == 1


def test_a_connection_that_breaks_in_the_middle(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.drops = -1
    assert push(folder, "--debug") == 2
    error = capsys.readouterr().err
    assert "upload: the connection to the hub broke, and nothing was committed; the same command" in error
    assert "signed" not in error and TOKEN not in error
    assert hub.files[REPO, "main"] == {}
    hub.drops = 1  # once more: the client itself goes on
    assert push(folder) == 0
    sent(hub, folder)


def test_what_arrived_before_a_connection_broke_is_not_sent_again(hub: Hub, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model-00002-of-00002.safetensors").write_bytes(os.urandom(2000))
    (folder / "model-00001-of-00002.safetensors").write_bytes(os.urandom(2000))
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    hub.spared, hub.drops = 1, -1
    assert push(folder) == 2
    assert len(hub.objects) == 1 and hub.commits == 0
    hub.drops, before = 0, len(hub.requests)
    assert push(folder) == 0
    sent(hub, folder)
    assert len([request for request in hub.requests[before:] if request.startswith("PUT")]) == 1


@pytest.mark.parametrize(
    ("path", "answer", "said"),
    [
        ("/api/whoami", (401, "Invalid credentials in Authorization header"), "does not know this token (401)"),
        ("/api/repos/create", (403, "no rights"), f"may not write to {REPO} (403)"),
        ("/api/models/me/tiny-int8/preupload", (403, "no rights"), f"may not write to {REPO} (403)"),
        ("/api/models/me/tiny-int8/commit", (413, "too much"), "the hub refuses (413): too much"),
        ("/api/models/me/tiny-int8/commit", (502, ""), "the hub fails (502); later the same command"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    path: str, answer: tuple[int, str], said: str, hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refuse[path] = answer
    assert push(folder, "--debug") == 2
    shown = capsys.readouterr()
    assert said in shown.err.splitlines()[-1]
    assert TOKEN not in shown.out + shown.err
    assert not hub.files.get((REPO, "main"))


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("hf_wrongWRONGwrongWRONGwrongWRONG1234", "does not know this token (401)"),
        ("hf_secret\x0bsecret", "characters that no token has"),
        ("hf_sécret", "the hub's client failed (UnicodeEncodeError)"),
    ],
)
def test_a_wrong_token_is_never_shown(
    token: str, said: str, hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    assert push(folder, "--debug") == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert token not in shown.out + shown.err and "cret" not in shown.err
    assert not hub.files


def test_no_token_no_network_and_offline(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert push(folder) == 2
    assert "http://127.0.0.1:9 cannot be reached" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert push(folder) == 2
    assert "no token to push with; run: hf auth login" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert push(folder) == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    assert not hub.requests


def test_a_dry_run_lists_and_prints_without_network(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(folder, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "10,000 bytes  model.safetensors" in said and f'model_id = "{REPO}"' in said and "nothing was sent" in said
    assert not hub.requests


def test_what_must_not_be_published_is_refused_first(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused() -> str:
        assert push(folder) == 2
        assert not hub.requests
        return capsys.readouterr().err

    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card + "\n## Results\n\n| a | b |\n| --- | --- |\n| 1 |  |\n\nTo be filled.\n")
    said = refused()
    assert "an empty cell" in said and "'To be filled'" in said and "quantize card" in said
    (folder / "README.md").write_text(card)
    (folder / "tokenizer_config.json").write_text(f'{{"token": "{TOKEN}"}}')
    said = refused()
    assert "tokenizer_config.json holds what looks like a token" in said and TOKEN not in said
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002-of-2.safetensors"}}')
    assert "lacks model-00002-of-2.safetensors" in refused()
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").unlink()
    assert "lacks weights" in refused()


@pytest.mark.parametrize("repo", ["a/b/c", "me/bad name", "me/--x", "me/x.git", ""])
def test_names_that_no_repository_has(repo: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(folder, repo=repo) == 2
    assert f"--repo {repo} can be no repository: it is OWNER/NAME" in capsys.readouterr().err


def test_runs_that_have_nothing_to_push(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = quickstart_metrics()
    simulated = make_run(tmp_path / "simulated", {**metrics, "simulated": True, "missing": ["a CUDA GPU"]})
    unfinished = make_run(tmp_path / "unfinished", metrics)
    (unfinished / "metrics.json").unlink()
    plain = make_run(tmp_path / "plain", {**metrics, "scheme": None})
    for run, said in (
        (simulated, f"was only simulated (a CUDA GPU): what ships is not written yet. Finish it where the target runs: "
         f"quantize convert {simulated} --target cpu"),
        (unfinished, f"is not finished; continue it with: train --resume {unfinished}"),
        (plain, "quantises nothing"),
    ):  # fmt: skip
        for verb in (["push", str(run), "--repo", REPO], ["card", str(run)]):
            assert main(verb) == 2
            assert said in capsys.readouterr().err
    assert not hub.requests
