"""The Dockerfile as its parser reads it: what each image promises, and the script that tries it."""

from __future__ import annotations

import re
import subprocess

import dockerfile
import dockerfile_steps
import pytest

STAGES = dockerfile.parse((dockerfile.ROOT / "Dockerfile").read_text(encoding="utf-8"))
NAMED = {stage.name: stage for stage in STAGES}
TARGETS = {"cuda": "cuda-py312.txt", "cpu": "cpu-py311.txt"}


def of(target: str, name: str) -> list[dockerfile.Instruction]:
    """A target's instructions of one kind, those of the stages below it first."""
    steps = [step for stage in dockerfile.chain(STAGES, target) for step in stage.instructions]
    return [step for step in steps if step.name == name]


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_as_a_user_and_starts_its_command(target: str) -> None:
    last = NAMED[target].instructions
    users = [step.rest for step in last if step.name == "USER"]
    assert users and re.fullmatch(r"[1-9]\d+(:[1-9]\d+)?", users[-1]), "by number, so that Kubernetes can check it"
    after = [step.name for step in last[[step.name for step in last].index("USER") + 1 :]]
    assert not {"USER", "COPY"} & set(after)
    assert [step.words() for step in last if step.name == "ENTRYPOINT"] == [["tini", "--"]]
    assert [step.words() for step in last if step.name == "CMD"] == [["train", "--help"]]


def test_base_images_are_pinned_and_stages_named() -> None:
    outside = [stage.image for stage in STAGES if stage.image not in NAMED]
    assert outside and all(re.fullmatch(r"[\w./-]+:\d+\.\d+[\w.-]*", image) for image in outside)
    assert len(NAMED) == len(STAGES) and all(NAMED)


@pytest.mark.parametrize(("target", "lock"), TARGETS.items())
def test_a_lock_is_a_layer_below_the_source_and_pip_has_a_cache(target: str, lock: str) -> None:
    packages = NAMED[f"{target}-packages"].instructions
    copied = next(step for step in packages if step.name == "COPY")
    installs = [step for step in packages if "pip install" in step.rest]
    assert copied.rest.split()[0] == f"requirements/{lock}" and (dockerfile.ROOT / "requirements" / lock).is_file()
    assert [step.line > copied.line for step in installs] == [True]
    (mount,) = installs[0].mounts()
    cache = next(step.rest for step in packages if step.name == "ENV")
    assert mount["type"] == "cache" and f"PIP_CACHE_DIR={mount['target']}" in cache.split()
    assert [step for step in packages if any(each["type"] == "bind" for each in step.mounts())] == []
    (source,) = [step for step in NAMED[target].instructions if "pip install" in step.rest]
    assert source.mounts() == [{"type": "bind", "target": "/src", "rw": "true"}]
    installs += [source]
    assert all("--no-deps" in step.rest for step in installs)


@pytest.mark.parametrize("target", TARGETS)
def test_apt_leaves_no_lists_behind(target: str) -> None:
    apt = [step.rest for step in of(target, "RUN") if "apt-get" in step.rest]
    assert apt
    for text in apt:
        assert "--no-install-recommends" in text and "rm -rf /var/lib/apt/lists/*" in text


@pytest.mark.parametrize(
    ("path", "goes"),
    [
        (".git/config", False), (".venv/bin/python", False), ("runs/a/adapter/adapter_model.safetensors", False),
        ("train/__pycache__/cli.cpython-311.pyc", False), ("tests/unit/test_cli.py", False), ("wandb/x", False),
        (".env", False), ("requirements/check.py", False), ("requirements/cpu-py311.txt", True),
        ("train/cli.py", True), ("quantize/doctor/child.py", True), ("configs/tiny.yaml", True),
        ("examples/data/reasoning_eval.jsonl", True), ("pyproject.toml", True), ("README.md", True),
    ],
)  # fmt: skip
def test_the_build_context_holds_the_source_and_nothing_else(path: str, goes: bool) -> None:
    assert dockerfile.let_in(path, dockerfile.ignore_patterns()) == goes


@pytest.mark.parametrize("target", TARGETS)
def test_the_script_of_a_target_is_bash_and_copies_what_its_stages_copy(target: str) -> None:
    text = dockerfile_steps.script(STAGES, target)
    checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    other = next(name for name in TARGETS if name != target)
    assert f"requirements/{TARGETS[target]}" in text and f"requirements/{TARGETS[other]}" not in text
    assert f'cp -a "$WORK"/{target}-packages/opt/venv/. "$WORK"/{target}/opt/venv/' in text
    assert f'chroot --userspec=10001 "$WORK"/{target} ' in text


EVERYTHING = """# syntax=docker/dockerfile:1
FROM debian:12.1 AS below
ARG FLAVOUR="plain"
ENV PATH=/opt/bin:$PATH GREETING="good day"
SHELL ["/bin/bash", "-c"]
RUN --mount=type=cache,target=/var/cache,sharing=locked --mount=type=bind,target=/src,rw \\
    # a comment between continued lines
    make -C /src \\
    && echo "$FLAVOUR"
RUN <<END
set -e
echo one \\
  two
END
FROM below AS above
COPY --from=below --chown=7:7 /opt /opt
COPY <<END /etc/motd
hello
END
WORKDIR /home
WORKDIR mine
USER 7:7
RUN touch here
CMD ["a b", "c"]
"""


def test_the_parser_reads_continued_lines_mounts_heredocs_and_flags() -> None:
    below, above = dockerfile.parse(EVERYTHING)
    assert (below.image, below.name, above.image) == ("debian:12.1", "below", "below")
    make, heredoc = (step for step in below.instructions if step.name == "RUN")
    assert make.rest.split() == ["make", "-C", "/src", "&&", "echo", '"$FLAVOUR"'] and make.line == 6
    assert [mount["type"] for mount in make.mounts()] == ["cache", "bind"] and make.mounts()[1]["rw"] == "true"
    assert heredoc.heredocs == ("set -e\necho one \\\n  two\n",)
    assert [step.options("chown") for step in above.instructions if step.name == "COPY"] == [["7:7"], []]


def test_the_script_keeps_user_folder_environment_and_arguments() -> None:
    text = dockerfile_steps.script(dockerfile.parse(EVERYTHING), "above")
    assert subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True).stderr == ""
    touch = next(line for line in text.splitlines() if "touch here" in line and line.startswith("chroot"))
    assert "--userspec=7:7" in touch and "cd /home/mine" in touch
    assert f"PATH=/opt/bin:{dockerfile_steps.DEFAULT_PATH}" in touch and "'GREETING=good day'" in touch
    assert "FLAVOUR" not in touch, "an argument ends with its stage"
    assert 'FLAVOUR="${FLAVOUR-plain}"' in next(
        line for line in text.splitlines() if "make -C" in line and "env" in line
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("RUN true\n", "before the first FROM"),
        ("FROM a:1 AS a\nRUN <<END\n", "has no end"),
        ("FROM a:1 AS a\nRUN true \\", "nothing follows"),
        ("FROM a:1 AS a\nADD x /x\n", "line 2: ADD is not known here"),
        ("FROM a:1 AS a\nCMD train --help\n", "not in the exec form"),
        ("FROM a:1 AS a\nRUN --mount=type=secret,id=x true\n", "a mount of type secret"),
    ],
)
def test_what_the_script_cannot_do_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dockerfile_steps.script(dockerfile.parse(text), "a")
