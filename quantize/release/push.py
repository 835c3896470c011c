"""Uploads a release to the hub: an explicit list of files, in one commit, checked before the first byte leaves.

The token comes from the hub client alone (`hf auth login`, HF_TOKEN). What the client says of a failure is never shown
as it is: its messages may hold signed addresses, and those of its HTTP library the header with the token.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import UserError
from quantize.record import RECORD, read_record
from quantize.release.card import FILE, write_card
from quantize.release.recipe import public_settings
from quantize.release.source import find_release
from quantize.release.text import check_repository, find_blanks, with_repository

_UPLOADED = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab*", "merges.txt", "*.model",
    "*.py", "LICENSE*", FILE, RECORD,
)  # fmt: skip
_TEXT = (".json", ".md", ".py", ".jinja", ".txt", "")
_SECRETS = (
    re.compile(r"\bhf_[A-Za-z0-9]{30,}\b"),
    re.compile(r"\bgh[pousr]_[A-Za-z0-9]{36}\b"),
    re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
)
_AGAIN = "the same command starts again, and sends only what has not arrived"
_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What a push sends.

    Attributes:
        folder: where the files lie.
        files: their names.
        left: names of files that stay behind.
        card: the text of README.md, its code loading `repository`.
        record: the text of ongrid.json without the folders of this machine; None = there is none.
    """

    folder: Path
    repository: str
    files: Sequence[str]
    left: Sequence[str]
    card: str
    record: str | None = None

    def content(self, name: str, repository: str) -> bytes | Path:
        """What is sent of a file: itself, or its text for that repository."""
        if name == FILE:
            return with_repository(self.card, repository).encode()
        return self.record.encode() if name == RECORD and self.record is not None else self.folder / name

    def listing(self) -> Iterator[str]:
        """One line a file, with its size."""
        for name in self.files:
            content = self.content(name, self.repository)
            size = content.stat().st_size if isinstance(content, Path) else len(content)
            shown = f"{size / _MIB:,.1f} MiB" if size >= _MIB else f"{size:,} bytes"
            yield f"{shown:>16}  {name}"
        if self.left:
            yield f"not uploaded: {', '.join(self.left)}"


def prepare_upload(source: str, root: str, repository: str) -> Upload:
    """The files of a release and its card; a card that is missing is written first. Needs no network.

    Raises:
        UserError: no repository's name; nothing finished there; files missing; a card with blanks; a secret in a file.
    """
    check_repository(repository)
    release = find_release(source, root)
    folder = release.folder
    if not (folder / FILE).is_file():
        write_card(source, root)
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    files = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in _UPLOADED)]
    files = [name for name in files if not name.startswith(".")]
    problems = [f"{folder} lacks {what}" for what in _missing(folder, files)]
    card = with_repository((folder / FILE).read_text(encoding="utf-8"), repository)
    problems += [
        f"{folder / FILE} has blanks, {blank}; fill it in or write it anew: quantize card {source}"
        for blank in find_blanks(card)
    ]
    problems += list(_secrets(folder, files))
    if problems:
        raise UserError(*problems)
    left = [name for name in names if name not in files]
    found = public_settings(read_record(folder))
    record = json.dumps(found, indent=1) + "\n" if found else None
    return Upload(folder=folder, repository=repository, files=files, left=left, card=card, record=record)


def push(upload: Upload, *, private: bool = False, revision: str | None = None) -> str:
    """Creates the repository where it is not there, and uploads everything in one commit; returns its address.

    Raises:
        UserError: no token, a wrong one, no rights, the hub out of reach, or a connection that broke. Nothing is
            committed then, and the same call goes on: what has arrived is not sent again.
    """
    from huggingface_hub import CommitOperationAdd, constants, logging

    if constants.is_offline_mode():
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it (--dry-run needs no network)")
    logging.set_verbosity_error()  # its notices of retries hold the signed addresses of the storage
    client = _Client(upload.repository)
    client.make_repository(private)
    if revision:
        client.ask("create the branch", "create_branch", client.repository, branch=revision, exist_ok=True)
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=upload.content(name, client.repository))
        for name in upload.files
    ]
    client.ask(
        "upload", "create_commit", client.repository, operations, commit_message="Upload by ongrid", revision=revision
    )
    tree = f"/tree/{revision}" if revision else ""
    return f"{client.api.endpoint}/{client.repository}{tree}"


class _Client:
    """The hub's client, whose failures are one sentence each.

    Raises UserError where there is no token, or the hub does not know it.
    """

    def __init__(self, repository: str) -> None:
        from huggingface_hub import HfApi, get_token

        self.repository, self._token = repository, ""
        self._token = self._call("look for a token", get_token) or ""
        if not self._token:
            raise UserError("no token to push with; run: hf auth login, or set HF_TOKEN to one with the role write")
        self.api = HfApi(token=self._token)
        me = self.ask("check the token", "whoami")
        if "/" not in repository:
            self.repository = f"{me['name']}/{repository}"

    def make_repository(self, private: bool) -> None:
        """Creates it where it is not there. Raises UserError where a private one is asked for and it is public."""
        self.ask("create the repository", "create_repo", self.repository, private=private or None, exist_ok=True)
        if private and not self.ask("look at the repository", "model_info", self.repository).private:
            raise UserError(
                f"--private: {self.repository} exists and is public; make it private first, or leave --private out"
            )

    def ask(self, doing: str, method: str, *values: Any, **options: Any) -> Any:
        """What a method of HfApi returns. Raises UserError, without the client's own text."""
        return self._call(doing, lambda: getattr(self.api, method)(*values, **options))

    def _call(self, doing: str, call: Callable[[], Any]) -> Any:
        reason = ""
        try:
            return call()
        except Exception as error:  # the client raises many kinds; each is the user's or the network's
            reason = f"{doing}: {_reason(error, self.repository, doing)}".replace(self._token or "\0", "***")
        raise UserError(reason)  # out of the handler: the client's error is no part of any traceback


def _reason(error: Exception, repository: str, doing: str) -> str:
    """Why the client failed and what to do, from the kinds and codes of the errors alone."""
    import httpx

    chain: list[BaseException] = [error]
    while (below := chain[-1].__cause__ or chain[-1].__context__) is not None and below not in chain:
        chain.append(below)
    answers = [answer for each in chain if (answer := getattr(each, "response", None)) is not None]
    if answers:
        said = next((each.server_message for each in chain if getattr(each, "server_message", None)), "")  # type: ignore[attr-defined]
        return _answered(answers[0].status_code, " ".join(str(said).split()), repository)
    if any(isinstance(each, httpx.LocalProtocolError) for each in chain):
        return "the token holds characters that no token has; run: hf auth login, or set HF_TOKEN anew"
    if any(isinstance(each, httpx.ConnectError) for each in chain) and doing != "upload":
        from huggingface_hub import constants

        return f"{constants.ENDPOINT} cannot be reached; check the network and HF_ENDPOINT, then repeat the command"
    if any(isinstance(each, httpx.TransportError | ConnectionError) for each in chain):
        return f"the connection to the hub broke, and nothing was committed; {_AGAIN}"
    return f"the hub's client failed ({type(error).__name__}); {_AGAIN}"


def _answered(status: int, said: str, repository: str) -> str:
    """What an HTTP status of the hub means."""
    if status == 401:
        return "the hub does not know this token (401); run: hf auth login, or set HF_TOKEN to a valid one"
    if status == 403:
        return f"this token may not write to {repository} (403); use one with the role write, or another --repo"
    if status == 404:
        return f"the hub has no {repository} that this token can reach (404); check --repo, --revision and HF_ENDPOINT"
    if status == 429:
        return f"the hub asks to wait (429: too many requests); later {_AGAIN}"
    if status < 500:
        return f"the hub refuses ({status}){': ' if said else ''}{said}"
    return f"the hub fails ({status}); later {_AGAIN}"


def _missing(folder: Path, files: Sequence[str]) -> Iterator[str]:
    """What a checkpoint cannot be loaded without."""
    if not any(name.endswith(".safetensors") for name in files):
        yield "weights (.safetensors)"
    if not any(name.startswith("tokenizer") for name in files):
        yield "its tokenizer"
    for index in (name for name in files if name.endswith(".safetensors.index.json")):
        shards = set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())
        yield from sorted(shards - set(files))


def _secrets(folder: Path, files: Sequence[str]) -> Iterator[str]:
    """A sentence for each text file that holds what looks like a key, without the key."""
    from huggingface_hub import get_token

    try:
        token = get_token()
    except Exception:  # said when the token is used
        token = None
    for name in files:
        path = folder / name
        if path.suffix not in _TEXT:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if (token and token in text) or any(secret.search(text) for secret in _SECRETS):
            yield f"{path} holds what looks like a token or a private key; take it out before it is published"
