"""Keys of the server's callers: a file of their hashes, and what each may ask (floor 5).

A key is 32 random bytes in text, shown once, when it is made; the file holds its SHA-256. A slow
hash would protect nothing more: such a key cannot be guessed, and every request would pay for it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sidepath.config import as_dict, build, check, require
from sidepath.errors import ConfigError, StoreError, in_one_line
from sidepath.injection.registry import NAME
from sidepath.store.file import publish_file
from sidepath.store.tensors import read_json

FORMAT = 1
PREFIX = "sp-"
MOST_KEYS = 10_000
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Key:
    """One caller's key, without the key itself."""

    name: str
    """What the caller is called, in this file and in messages."""
    sha256: str = ""
    """SHA-256 of the key, in hexadecimal."""
    admin: bool = False
    """Whether it may change what is served."""
    models: tuple[str, ...] | None = None
    """Names of models it may ask, the base's among them or not; nothing: every one."""
    requests_per_minute: float | None = None
    """Requests it may send a minute, in a burst or evenly; nothing: any number."""
    at_once: int | None = None
    """Answers it may wait for at once; nothing: any number."""

    def __post_init__(self) -> None:
        check(self)
        rate = self.requests_per_minute
        rules = {
            "name": NAME.fullmatch(self.name) is not None,
            "sha256": _DIGEST.fullmatch(self.sha256 or "0" * 64) is not None,
            "requests_per_minute": rate is None or rate >= 1,
            "at_once": self.at_once is None or self.at_once >= 1,
        }
        require(self, rules)


class Keys:
    """The keys of one server."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self.all = tuple(keys)

    def of(self, given: str) -> Key | None:
        """The key that `given` is the secret of.

        Every key is compared, each in constant time, whichever it is: the time that an answer takes
        tells neither how near a guess came, nor to which key.
        """
        digest, found = digest_of(given), None
        for key in self.all:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found


def digest_of(secret: str) -> str:
    """What the file holds of a secret."""
    return hashlib.sha256(secret.encode(errors="surrogateescape")).hexdigest()


def read_keys(path: str | os.PathLike[str]) -> Keys:
    """The keys of a file.

    Errors: one `StoreError` that names every fault: also where others than its owner may write
    the file, since whoever can write it can let himself in.
    """
    try:
        mode = os.stat(path).st_mode
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise StoreError(
                "others may write the file of keys",
                where=path,
                found=f"mode {stat.S_IMODE(mode):03o}",
                hint=f"chmod 600 {os.fspath(path)}",
            )
        values = read_json(path)
    except OSError as error:
        raise StoreError(f"cannot read the keys: {error.strerror}", where=path) from error
    except ValueError as error:
        raise StoreError("the file of keys is not one", where=path, found=str(error)) from error
    return Keys(_understood(values, path))


def _understood(values: Any, path: str | os.PathLike[str]) -> list[Key]:
    form = isinstance(values, dict) and values.keys() == {"format", "keys"}
    if not form or values["format"] != FORMAT or not isinstance(values["keys"], list):
        raise StoreError(
            "the file of keys is not one",
            where=path,
            expected=f'{{"format": {FORMAT}, "keys": [...]}}, as `serve --new-key` writes it',
        )
    keys, faults = [], []
    for number, entry in enumerate(values["keys"][:MOST_KEYS]):
        try:
            keys.append(_key(entry))
        except ConfigError as error:
            faults.append(f"keys[{number}]: {in_one_line(error)}")
    if len(values["keys"]) > MOST_KEYS:
        faults.append(f"{len(values['keys'])} keys, at most {MOST_KEYS}")
    faults += _twice("name", [key.name for key in keys])
    faults += _twice("sha256", [key.sha256 for key in keys])
    if faults:
        raise StoreError("the keys cannot be used", where=path, faults=faults)
    return keys


def _key(entry: Any) -> Key:
    if not isinstance(entry, Mapping):
        raise ConfigError("not a table")
    missing = [name for name in ("name", "sha256") if not entry.get(name)]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} missing")
    return build(Key, entry)


def _twice(what: str, values: Sequence[str]) -> list[str]:
    double = sorted({value for value in values if values.count(value) > 1})
    return [f'{what} "{value}" is there twice' for value in double]


def add_key(path: str | os.PathLike[str], key: Key) -> str:
    """Make a secret for `key`, whose `sha256` is filled in, and write it to the file, which is made
    if need be; readable and writable by its owner alone. Returns the secret, which is kept nowhere.

    Errors: `StoreError` for a name that has a key, and as for `read_keys`; `WriteFailed`. Nothing
    has changed then.
    """
    there = list(read_keys(path).all) if os.path.lexists(path) else []
    if key.name in (other.name for other in there):
        raise StoreError(
            f'"{key.name}" has a key already',
            where=path,
            hint="choose another name; or take its entry out of the file, and make it anew",
        )
    secret = PREFIX + secrets.token_urlsafe(32)
    entries = [as_dict(each) for each in (*there, replace(key, sha256=digest_of(secret)))]
    text = json.dumps({"format": FORMAT, "keys": entries}, indent=2) + "\n"
    with publish_file(path, overwrite=True, mode=0o600) as file:
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as opened:
            opened.write(text)
    return secret
