"""Adapters and bases of the Hugging Face hub, by name: `hub:OWNER/NAME[@REVISION]` (floor 4).

Wherever a folder is taken, such a name stands for the repository's folder in huggingface_hub's own
cache (`HF_HOME`), fetched with the token of its own login (`hf auth login`). Fetched are the files
that are read here and nothing else: safetensors, settings, tokenizers, texts; no pickle, no code.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from sidepath.errors import HubError, SidepathError, StoreError
from sidepath.store.tensors import PICKLES

PREFIX = "hub:"
GRAMMAR = f"{PREFIX}OWNER/NAME[@REVISION]"
_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^\s,@]+))?", re.ASCII)
_UNNAMED = re.compile(r"--|\.\.|\.git$|^[.-]|[.-]$|/[.-]|[.-]/")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SNAPSHOT = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)", re.ASCII)

Place = str | os.PathLike[str]
"""A folder, or the name of a repository on the hub."""


@dataclass(frozen=True)
class Kind:
    """What a repository is fetched for: its files by pattern, and the one it must have."""

    what: str
    needed: str
    files: tuple[str, ...]
    left_out: tuple[str, ...] = ("*/*",)

    def takes(self, name: str) -> bool:
        """Whether a file of this name is fetched."""
        return any(fnmatchcase(name, pattern) for pattern in self.files) and not any(
            fnmatchcase(name, pattern) for pattern in self.left_out
        )


_AGAIN = (
    "see that the hub can be reached, then try again: what has come is kept, and what broke off "
    "is not used. HF_HUB_OFFLINE=1 takes what was fetched before"
)
_TEXTS = ("*.json", "*.md", "*.txt")
_WEIGHTS = "adapter_model.safetensors"
ADAPTER = Kind("adapter", _WEIGHTS, (_WEIGHTS, "*.toml", *_TEXTS))
BASE = Kind(
    "transformers model",
    "config.json",
    ("*.safetensors", "*.model", "*.jinja", "*.tiktoken", *_TEXTS),
    # Mistral's own copy of the weights, beside the one that transformers reads; adapters.
    ("*/*", "consolidated*.safetensors", "adapter_*"),
)
CONFIG = Kind("transformers model", "config.json", ("config.json",))


@dataclass(frozen=True)
class HubPlace:
    """A repository on the hub, at a branch, tag or commit; its main branch where none is named."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{PREFIX}{self.name}" + (f"@{self.revision}" if self.revision else "")

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return _COMMIT.fullmatch(self.revision or "") is not None


def is_hub(place: Place) -> bool:
    """Whether a place is a name on the hub."""
    return os.fspath(place).startswith(PREFIX)


def is_name(text: str) -> bool:
    """Whether a text can be a repository's OWNER/NAME."""
    found = _NAME.fullmatch(text)
    return found is not None and found["revision"] is None and not _UNNAMED.search(text)


def refuse_hub(output: Place) -> None:
    """Raise `StoreError` for a name on the hub where a folder is to be written."""
    if is_hub(output):
        raise StoreError(
            "the output has to be a folder",
            where=output,
            hint="sidepath push ADAPTER hub:OWNER/NAME uploads an adapter's folder",
        )


def parse_place(text: Place) -> HubPlace:
    """What a name in the grammar above stands for. Errors: `HubError` for any other text."""
    found = _NAME.fullmatch(os.fspath(text).removeprefix(PREFIX))
    if found is None or not is_name(found["name"]):
        raise HubError("not the name of a repository on the hub", found=text, expected=GRAMMAR)
    return HubPlace(found["name"], found["revision"])


def local(place: Place, kind: Kind) -> Path:
    """The folder that a place stands for: itself, or its repository's, fetched where need be.

    Errors: `HubError` as of `fetch`.
    """
    return fetch(parse_place(place), kind) if is_hub(place) else Path(place)


def pinned(place: Place, kind: Kind) -> str:
    """A place as it can be found again: a repository, fetched now, by its commit.

    Errors: `HubError` as of `fetch`.
    """
    if not is_hub(place):
        return os.fspath(place)
    wanted = parse_place(place)
    return str(HubPlace(wanted.name, fetch(wanted, kind).name))


def snapshot_of(folder: Place) -> HubPlace | None:
    """The repository and commit that a folder of the hub's cache holds; None for other folders."""
    parts = Path(folder).parts[-3:]
    if len(parts) < 3 or parts[1] != "snapshots" or not _COMMIT.fullmatch(parts[2]):
        return None
    found = _SNAPSHOT.fullmatch(parts[0])
    return HubPlace(f"{found['owner']}/{found['name']}", parts[2]) if found else None


def name_of(folder: Place) -> str:
    """What a folder is called: its own name, or its repository's."""
    real = os.path.realpath(folder)
    place = snapshot_of(real)
    return place.name.partition("/")[2] if place else os.path.basename(real)


def origin_of(folder: Place) -> dict[str, str]:
    """A folder in a record: its name, and under "hub" its repository and commit if it has them."""
    place = snapshot_of(os.path.realpath(folder))
    return {"name": name_of(folder)} | ({"hub": str(place)} if place else {})


def fetch(place: HubPlace, kind: Kind) -> Path:
    """The repository's folder in the cache; its own name is the commit.

    Where the environment says `HF_HUB_OFFLINE=1`, what was fetched before is used; else the hub
    says which commit the revision is now, and a cached one never stands in for it. Files that are
    in the cache are not fetched again, and one that breaks off is never taken for whole.

    Errors: `HubError` for a repository or revision that is not there, that access is refused to,
    that holds no `kind`; when the hub is not reached or the download breaks off.
    """
    return _commit(place, kind) if place.pinned else _fetched(place, kind)


@functools.lru_cache(maxsize=256)
def _commit(place: HubPlace, kind: Kind) -> Path:
    return _fetched(place, kind)


def _fetched(place: HubPlace, kind: Kind) -> Path:
    # By their names: huggingface_hub loads its modules when they are first asked for.
    from huggingface_hub import HfApi, constants, snapshot_download

    with reaching(place, "fetched from", _AGAIN):
        commit = None
        if not constants.HF_HUB_OFFLINE:
            api = HfApi()
            info = api.model_info(place.name, revision=place.revision, timeout=60)
            commit = str(info.sha)
            _require(place, kind, sorted(file.rfilename for file in info.siblings or ()))
        folder = Path(
            snapshot_download(
                place.name,
                revision=place.revision,
                allow_patterns=list(kind.files),
                ignore_patterns=list(kind.left_out),
            )
        )
    if commit is not None and folder.name != commit:
        # Where the hub fails the library takes whatever revision it has, without a word.
        raise HubError(
            "the repository changed while it was fetched, or the hub failed",
            where=place,
            found=f"commit {folder.name}",
            expected=f"commit {commit}",
            hint="try again",
        )
    _require(place, kind, sorted(path.name for path in folder.iterdir()))
    return folder


def _require(place: HubPlace, kind: Kind, names: Sequence[str]) -> None:
    if kind.needed in names:
        return
    pickles = [name for name in names if name.endswith(PICKLES)]
    raise HubError(
        f"the repository holds no {kind.what}",
        where=place,
        found=", ".join(names[:8]) or "nothing",
        expected=kind.needed,
        hint=f"pickle files such as {pickles[0]} are never loaded: ask its author for safetensors"
        if pickles
        else None,
    )


@contextmanager
def reaching(place: HubPlace, doing: str, again: str) -> Iterator[None]:
    """Turn whatever huggingface_hub and the network raise into one `HubError`; no bars in pipes.

    `doing` completes the sentence "cannot be ... the hub"; `again` says what to do when the hub
    was not reached, or failed.
    """
    try:
        with quiet_hub():
            yield
    except SidepathError:
        raise
    # The library lets through whatever its transport raises.
    except Exception as error:
        raise _refused(place, doing, again, error) from error


def _refused(place: HubPlace, doing: str, again: str, error: Exception) -> HubError:
    from huggingface_hub import errors

    login = "log in with `hf auth login`"
    said = next((one for one in _causes(error) if isinstance(one, errors.HfHubHTTPError)), error)
    status = said.response.status_code if isinstance(said, errors.HfHubHTTPError) else None
    if isinstance(said, errors.GatedRepoError):
        what = "the repository is gated: its owner grants access one by one"
        hint = f"ask for access on the repository's page, then {login}"
    elif isinstance(said, errors.RevisionNotFoundError):
        what, hint = "the repository has no such revision", "name a branch, a tag or a commit of it"
    elif isinstance(said, errors.RepositoryNotFoundError):
        what = "there is no such repository, or it is private"
        hint = f"see that OWNER/NAME is right; for a private one {login}"
    elif status in (401, 403):
        what = f"the hub refused access: the repository cannot be {doing} the hub"
        hint = f"{login} with a token that may do this"
    elif status is not None or not isinstance(error, OSError) or error.errno is None:
        what, hint = f"the repository cannot be {doing} the hub", again
    else:
        what, hint = f"the repository cannot be {doing} the hub", "free space or check permissions"
    return HubError(what, where=place, found=reason(error), hint=hint)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    yield error
    if error.__cause__ is not None:
        yield from _causes(error.__cause__)


def reason(error: Exception) -> str:
    """The innermost cause says what happened; the outer errors say only where."""
    *_, inner = _causes(error)
    texts = [str(one).strip().partition("\n")[0] or type(one).__name__ for one in (error, inner)]
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} ({texts[1]})"


@contextmanager
def quiet_hub(*others: Any) -> Iterator[None]:
    """No warnings of huggingface_hub, or of the `others` (modules with its kind of logging),
    between our own lines; its progress bars on a terminal only.
    """
    from huggingface_hub import constants
    from huggingface_hub import utils as hub_utils

    utils: Any = hub_utils
    logs = [utils.logging, *others]
    levels = [(log, log.get_verbosity()) for log in logs]
    # By the user's environment.
    chosen = constants.HF_HUB_DISABLE_PROGRESS_BARS is not None
    as_they_are = chosen or sys.stderr.isatty() or utils.are_progress_bars_disabled()
    for log in logs:
        log.set_verbosity_error()
    if not as_they_are:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        for log, level in levels:
            log.set_verbosity(level)
        if not as_they_are:
            utils.enable_progress_bars()
