"""README and docs: their commands, options, messages, numbers and links are those of the code as it is."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from documented import CAPITALS, COMMAND, NOT_RUN, ROOT, documents, joined_lines

from quantize.cli import _parser, _split
from quantize.commands import VERBS
from quantize.errors import UserError
from quantize.schemes import served_formats
from train.cli import split_arguments
from train.config import RunConfig
from train.config_loading import find_config, load_config
from train.config_values import keys_of, parse_options
from train.sweep import plan_sweep

PAGES = {str(page.relative_to(ROOT)): page for page in documents()}
MEASURED = [ROOT / "README.md", ROOT / "docs" / "RESULTS.md", ROOT / "docs" / "RUN.md"]
FILLED = {page for page in PAGES.values() if re.search("^<!-- generated|^:::", page.read_text(), re.MULTILINE)}
"""Pages that the site's build fills: their anchors are not in the file."""
SECTIONS = [name for name in RunConfig.model_fields if name != "qat"]
FILES = (".json", ".jsonl", ".md", ".parquet", ".pte", ".safetensors", ".yaml")
OTHERS = {
    "wandb": "needs an account, and its server",
    "docker": "needs Docker, an index and a GPU",
    "source": "the shell's own",
    "pip": "takes packages from an index",
    "python3.12": "pip, which takes packages from an index",
    "pre-commit": "writes into .git",
    "S": "a variable of the shell",
    "PIP_EXTRA_INDEX_URL": "a variable of the shell",
    **dict.fromkeys(("bash", "chroot", "debootstrap", "export", "mkdir"), "makes an image in chroot, as root"),
}
"""Programs of which no test looks at the options -> the reason."""


def shell_lines(page: Path) -> list[str]:
    """The lines of a page's bash blocks, without comments."""
    lines = (re.split(r"\s{2,}#|\s#\s|^#", line)[0].strip() for _, line, fence in joined_lines(page) if fence == "bash")
    return [line for line in lines if line]


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return "\n".join(line for _, line, fence in joined_lines(page) if fence is None)


def fragments(page: Path) -> list[str]:
    """What stands between backticks in a page's prose."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(page))


# ---- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_every_shown_command_has_options_that_exist(name: str) -> None:
    """Those that no test runs too: on a GPU, of the hub, or with a word in capitals for something of the reader's."""
    for line in shell_lines(PAGES[name]):
        words = shlex.split(line)
        program = re.split(r"[=/]", words[0])[-1] if "=" not in words[0] else words[0].partition("=")[0]
        if program == "quantize":
            _parser().parse_args(_split(words[1:])[0])
        elif program == "train":
            check_train(words[1:])
        elif program == "make":
            rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
            assert {word for word in words[1:] if "=" not in word} <= set(rules), f"{name}: {line}"
        elif program.startswith(("python", "pytest")) and "pip" not in words:
            files = [word for word in words if re.fullmatch(r"[\w/]+\.py|tests/\w+", word)]
            assert files and all((ROOT / file).exists() for file in files), f"{name}: {line}"
        else:
            assert program in OTHERS, f"{name}: {line}: run it in a test, or say in OTHERS why none does"


def check_train(words: list[str]) -> None:
    """The options of `train` and what they set; for a config of the reader's, in capitals, a packaged one stands in."""
    line = split_arguments(words)
    assert not line.errors
    if line.config is not None and CAPITALS.search(line.config):
        load_config(find_config("tiny.yaml"), ["--qat=int8-int4", *line.overrides])
    elif line.config is not None:
        load_config(find_config(line.config), line.overrides)
    elif line.sweep is not None:
        plan_sweep(line.sweep, line.overrides, int(line.trials) if line.trials else None)
    else:
        assert line.resume is not None or "--help" in line.flags
        assert parse_options(RunConfig, line.overrides)[1] == []


OF_VLLM = {
    word.partition("=")[0] for _, target in served_formats() for word in target.vllm_arguments if word.startswith("--")
}


@pytest.mark.parametrize("name", PAGES)
def test_every_option_in_the_text_exists(name: str) -> None:
    for text in fragments(PAGES[name]):
        for option in re.findall(r"--(\w+(?:[.-]\w+)*\.[\w.-]+)", text):
            known = is_key(option.replace("-", "_")) or f"--{option}" in OF_VLLM
            assert known, f"{name}: --{option}"
        if text.startswith("quantize "):
            verb, *words = text.split()[1:]
            assert verb in VERBS, f"{name}: {text}"
            given = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert given <= set(verb_parsers()[verb]._option_string_actions), f"{name}: {text}"
        if re.fullmatch(rf"({'|'.join(SECTIONS)})(\.\w+)+", text):
            assert is_key(text) or is_module(text) or Path(text).suffix in FILES, f"{name}: {text}"


def is_key(text: str) -> bool:
    """A key of the configuration, or one in a section whose keys are the reader's."""
    return text in set(keys_of(RunConfig)) or text.startswith(("model.shape.", "train.extra."))


def is_module(text: str) -> bool:
    """`quantize.storage`, or a name in it."""
    package, module, *_ = text.split(".")
    return (ROOT / package / f"{module}.py").is_file()


def verb_parsers() -> dict[str, argparse.ArgumentParser]:
    """The parsers of `quantize`'s verbs."""
    return next(dict(action.choices) for action in _parser()._actions if action.dest == "verb" and action.choices)


def test_what_is_not_run_is_shown_somewhere() -> None:
    shown = {line for page in PAGES.values() for line in shell_lines(page)}
    assert set(NOT_RUN) <= shown
    assert all(COMMAND.match(command) for command in NOT_RUN)


def test_the_python_in_the_pages_imports_what_is_there() -> None:
    looked = 0
    for name, page in PAGES.items():
        for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("train.", "qat.", "quantize.")):
                    file = ROOT / f"{(node.module or '').replace('.', '/')}.py"
                    known = file.read_text(encoding="utf-8")
                    assert all(re.search(rf"\b{alias.name}\b", known) for alias in node.names), f"{name}: {node.module}"
                    looked += 1
    assert looked


# ---- messages --------------------------------------------------------------------------------------------------------


@cache
def literals() -> list[str]:
    """The texts of each module, those of its f-strings with … for what they insert; the Makefile's last."""
    found = []
    for package in ("train", "qat", "quantize"):
        for file in (ROOT / package).rglob("*.py"):
            texts = []
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    texts.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
            found.append("\n".join(texts))
    return [*found, (ROOT / "Makefile").read_text(encoding="utf-8")]


def messages() -> list[str]:
    """The messages that troubleshooting.md quotes."""
    page = ROOT / "docs" / "troubleshooting.md"
    return [line for _, line, fence in joined_lines(page) if fence == "text"]


@pytest.mark.parametrize("message", messages())
def test_a_quoted_message_is_in_the_code(message: str) -> None:
    """All that stands between the … of a message is said by one and the same module."""
    parts = [part for part in re.split("…", message) if part.strip(" ;:.,()'")]
    assert max(map(len, parts)) > 12, "too little of it to be recognised"
    assert any(all(part in text for part in parts) for text in literals()), parts


def test_the_most_likely_messages_are_there() -> None:
    assert len(messages()) == len(set(messages())) >= 25


# ---- numbers and links -----------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)+(?![\w.]*\d)|(?<![\w.])\d+(?=%)")


@pytest.mark.parametrize("name", ["index", "choosing", "converting", "qat", "phones", "serving", "troubleshooting"])
def test_a_measured_number_stands_in_the_results(name: str) -> None:
    known = {number for page in MEASURED for number in re.findall(r"\d+(?:\.\d+)*", page.read_text(encoding="utf-8"))}
    text = re.sub(r"`[^`]*`", "", prose(ROOT / "docs" / f"{name}.md"))
    assert sorted(set(_NUMBER.findall(text)) - known) == []


def test_the_picture_is_what_its_script_draws() -> None:
    spec = importlib.util.spec_from_file_location("picture", ROOT / "docs" / "_site" / "picture.py")
    assert spec is not None and spec.loader is not None
    picture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(picture)
    assert picture.FILE.read_text(encoding="utf-8") == picture.draw()


def anchors(page: Path) -> set[str]:
    """A page's anchors as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", [*PAGES, "CHANGELOG.md", "docs/quickstart/report.md"])
def test_links_lead_somewhere_in_a_clone(name: str) -> None:
    """In the site its build looks at them, in strict mode."""
    page = ROOT / name
    for place, anchor in re.findall(r"\]\((?![a-z]+:)([^)#]*)(?:#([^)]*))?\)", prose(page)):
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{name}: {place}"
        if anchor and target not in FILLED:
            assert anchor in anchors(target), f"{name}: {place}#{anchor}"


def test_an_option_that_does_not_exist_would_be_seen() -> None:
    with pytest.raises(UserError):
        check_train(["--config", "tiny.yaml", "--train.max-stops=8"])
    with pytest.raises(SystemExit):
        _parser().parse_args(["convert", "MODEL", "--schema", "int4"])
