"""Short questions to the hub: a wrong name, or a hub out of reach, is said at once, not after the client's retries."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Literal

TIMEOUT_S = 5

Kind = Literal["model", "dataset"]


class HubProblem(Exception):
    """The hub cannot give a repository; the text is its reason."""


def model_settings(repository: str, revision: str | None) -> dict[str, Any]:
    """config.json of a model on the hub.

    Raises:
        HubProblem: no such repository or file, no access, or the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_url

    settings = _ask(hf_hub_url(repository, "config.json", revision=revision))
    if not isinstance(settings, dict):
        raise HubProblem("its config.json holds no mapping")
    return settings


def check_repository(kind: Kind, repository: str, revision: str | None = None) -> None:
    """Asks whether a repository can be read.

    Raises:
        HubProblem: it cannot, and why.
    """
    from huggingface_hub import constants

    url = f"{constants.ENDPOINT}/api/{kind}s/{urllib.parse.quote(repository)}"
    _ask(url + (f"/revision/{urllib.parse.quote(revision, safe='')}" if revision else ""))


def is_cached(kind: Kind, repository: str) -> bool:
    """Whether the hub's cache on this machine holds something of a repository.

    Raises:
        HubProblem: the name is no hub id.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise HubProblem("the name is no hub id (OWNER/NAME)") from error
    folders = [Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type=kind)]
    if kind == "dataset":
        import datasets

        folders.append(Path(datasets.config.HF_DATASETS_CACHE) / repository.replace("/", "___"))
    return any(folder.is_dir() for folder in folders)


def _ask(url: str) -> Any:
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, but not in its __all__

    if constants.HF_HUB_OFFLINE:
        raise HubProblem("HF_HUB_OFFLINE is set")
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=build_hf_headers()), timeout=TIMEOUT_S) as got:
            return json.load(got)
    except urllib.error.HTTPError as error:
        said = error.headers.get("X-Error-Message") if error.headers else None
        raise HubProblem(f"the hub answers {error.code} {said or error.reason}") from error
    except (OSError, ValueError) as error:
        raise HubProblem(f"the hub cannot be reached ({getattr(error, 'reason', error)})") from error


def download_model(repository: str, revision: str | None = None, *, with_code: bool = False) -> Path:
    """A model of the hub as a local folder: settings, safetensors and tokenizer, and its own code where asked for.

    Raises:
        HubProblem: no such repository, no access, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*"]
    if not is_cached("model", repository):
        check_repository("model", repository, revision)
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns + ["*.py"] * with_code))
    except Exception as error:  # the hub client raises many kinds; each is the user's to solve
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise HubProblem(f"the hub says: {reason}") from error
