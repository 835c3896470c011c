"""Names of benchmarks, what is said of one that cannot be loaded, and which groups are one number."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantize.errors import UserError
from quantize.task_files import check_names, definition_key, local_definition, require_lm_eval, unloadable
from quantize.tasks import is_pooled

HOME = Path(__file__).resolve().parents[2]


def _refusal(*names: str) -> str:
    with pytest.raises(UserError) as caught:
        check_names(names)
    return "\n".join(caught.value.lines)


def test_a_hint_ends_in_a_full_stop_or_a_question_mark() -> None:
    assert "did you mean gsm8k? A local task is named by its .yaml file." in _refusal("gsm9k")
    assert "`lm-eval ls tasks` lists them. A local task is named" in _refusal("zzzzqqqq")


def test_a_missing_file_is_said_with_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = _refusal("mine/nope.yaml")
    assert str(tmp_path / "mine/nope.yaml") in text and str(HOME / "mine/nope.yaml") in text
    assert "examples/tasks/choices.yaml" in text


def test_the_advice_to_install_lm_eval_has_the_project_s_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        require_lm_eval()
    (bound,) = tomllib.loads((HOME / "pyproject.toml").read_text())["project"]["optional-dependencies"]["eval"]
    assert f"pip install '{bound}'" in str(caught.value) and "make setup" in str(caught.value)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ("parts/*.jsonl", ["parts/a.jsonl", "parts/b.jsonl"]),
        ({"test": "parts/[ab].jsonl"}, {"test": ["parts/a.jsonl", "parts/b.jsonl"]}),
        (["rows.jsonl", "parts/b*"], ["rows.jsonl", "parts/b.jsonl"]),
        ("**/*.jsonl", ["parts/a.jsonl", "parts/b.jsonl", "rows.jsonl"]),
        ("rows.jsonl", "rows.jsonl"),
    ],
)
def test_patterns_of_data_files_are_looked_for_beside_the_task(files: Any, found: Any, tmp_path: Path) -> None:
    home = tmp_path / "tasks [1]"  # no pattern itself
    (home / "parts" / "b.folder").mkdir(parents=True)
    for name in ("rows.jsonl", "parts/a.jsonl", "parts/b.jsonl"):
        (home / name).write_text("{}")
    file = home / "mine.yaml"
    file.write_text(json.dumps({"task": "mine", "dataset_kwargs": {"data_files": files}}))
    absolute = json.loads(json.dumps(found).replace("parts/", f"{home}/parts/").replace('"rows', f'"{home}/rows'))
    assert local_definition(file)["dataset_kwargs"]["data_files"] == absolute
    key = definition_key([str(file)])
    (home / ("rows.jsonl" if found == "rows.jsonl" else "parts/b.jsonl")).write_text('{"a": 1}')
    assert definition_key([str(file)]) != key


@pytest.mark.parametrize("files", ["none/*.jsonl", "hf://datasets/x/*.jsonl", "https://x.y/a?b.jsonl", "gone.jsonl"])
def test_files_that_do_not_lie_beside_the_task_are_left_as_they_are(files: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(json.dumps({"task": "mine", "dataset_kwargs": {"data_files": files}}))
    assert local_definition(tmp_path / "mine.yaml")["dataset_kwargs"]["data_files"] == files


class GatedRepoError(Exception):
    """Of the name of huggingface_hub's."""


def _raised(error: Exception, below: Exception) -> Exception:
    try:
        raise error from below
    except Exception as raised:
        return raised


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("Dataset 'Idavidrein/gpqa' is a gated dataset on the Hub."), "it is gated: ask for access"),
        (_raised(ValueError("no"), GatedRepoError("Access is restricted")), "then `hf auth login`"),
        (ValueError("403 Client Error: Forbidden for url"), "it is gated"),
        (
            _raised(
                ValueError("Dataset 'x/y' doesn't exist"),
                OSError("401 Client Error. If you try to access a gated repo, log in"),
            ),
            "it does not exist or is not public",
        ),
        (ConnectionError("Couldn't reach 'x/y' on the Hub (OfflineModeIsEnabled)"), "the hub cannot be reached"),
        (_raised(RuntimeError("no"), ConnectionError("reset")), "the hub cannot be reached"),
    ],
)
def test_what_to_do_where_data_cannot_be_had(error: Exception, said: str) -> None:
    (line,) = unloadable("gpqa_main", error).lines
    assert line.startswith("eval.tasks: gpqa_main cannot be loaded: ") and said in line


def test_no_advice_where_the_file_itself_is_wrong() -> None:
    (line,) = unloadable("mine", ValueError("bad output_type")).lines
    assert line == "eval.tasks: mine cannot be loaded: bad output_type"


def _aggregated(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{"metric": "acc", "weight_by_size": True, "aggregation": "mean", "filter_list": None} | changes
    )


@pytest.mark.parametrize(
    ("aggregated", "pooled"),
    [
        ([_aggregated()], True),
        ([_aggregated(metric="acc_norm"), _aggregated()], True),
        ([_aggregated(filter_list=["strict", "none"])], True),
        ([], False),
        ([_aggregated(weight_by_size=False)], False),
        ([_aggregated(metric="acc_norm")], False),
        ([_aggregated(filter_list=["strict"])], False),
        ([_aggregated(aggregation=max)], False),
    ],
)
def test_a_group_is_pooled_where_lm_eval_means_over_its_samples(aggregated: list[Any], pooled: bool) -> None:
    assert is_pooled(aggregated, "acc", "none") is pooled


@pytest.mark.parametrize(
    ("file", "metric", "chosen"),
    [
        ("mmlu/default/_mmlu.yaml", "acc", "none"),
        ("mmlu_pro/_mmlu_pro.yaml", "exact_match", "custom-extract"),
    ],
)
def test_the_groups_of_the_releases_are_pooled(file: str, metric: str, chosen: str) -> None:
    import lm_eval.tasks
    from lm_eval.config.group import GroupConfig
    from lm_eval.tasks._yaml_loader import load_yaml

    config = GroupConfig(**load_yaml(Path(lm_eval.tasks.__file__).parent / file))
    assert is_pooled(config.aggregate_metric_list or [], metric, chosen)
