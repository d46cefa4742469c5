"""Keys: what the file holds, what it refuses, and how a guess is compared."""

from __future__ import annotations

import hmac
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from sidepath.errors import ConfigError, StoreError, WriteFailed
from sidepath.serve.keys import Key, Keys, add_key, digest_of, read_keys
from tests.faults import Faults


def entry(name: str, secret: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "sha256": digest_of(secret), **more}


def write(path: Path, *entries: Any) -> Path:
    path.write_text(json.dumps({"format": 1, "keys": list(entries)}))
    path.chmod(0o600)
    return path


def test_a_key_is_shown_once_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "keys.json"
    first = add_key(path, Key(name="sql", models=("sql", "base"), requests_per_minute=5.0))
    second = add_key(path, Key(name="operator", admin=True))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["keys.json"]
    assert first != second
    assert len(first) >= 43
    text = path.read_text()
    assert first not in text
    assert second not in text
    keys = read_keys(path)
    found = keys.of(first)
    assert found == Key(
        name="sql", sha256=digest_of(first), models=("sql", "base"), requests_per_minute=5.0
    )
    operator = keys.of(second)
    assert operator is not None
    assert operator.admin
    for wrong in ("", first[:-1], first + "x", first.upper(), digest_of(first), "ü\udcff"):
        assert keys.of(wrong) is None


def test_a_name_has_one_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add_key(path, Key(name="sql"))
    before = path.read_bytes()
    with pytest.raises(StoreError, match='"sql" has a key already'):
        add_key(path, Key(name="sql", admin=True))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "values",
    [
        {"name": "two words"},
        {"name": "a", "sha256": "abc"},
        {"name": "a", "requests_per_minute": 0.0},
        {"name": "a", "at_once": 0},
        {"name": "a", "admin": "yes"},
    ],
)
def test_impossible_keys(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Key(**values)


def test_every_fault_of_a_file_is_named_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path / "keys.json",
        entry("a", "1"),
        entry("a", "2"),
        entry("b", "1"),
        entry("c", "3", modles=["x"]),
        {"name": "d"},
        entry("e", "4", at_once=-1),
        "f",
    )
    with pytest.raises(StoreError) as error:
        read_keys(path)
    faults = "\n".join(error.value.faults)
    for said in (
        'name "a" is there twice',
        "is there twice",
        'keys[3]: Key: unknown field; - "modles": did you mean "models"?',
        "keys[4]: sha256 missing",
        "keys[5]",
        "keys[6]: not a table",
    ):
        assert said in faults
    assert len(error.value.faults) == 6


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"format": 2, "keys": []}', '{"format": 1, "keys": {}}', "nul\0"]
)
def test_files_that_are_no_keys(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(StoreError, match="the file of keys is not one"):
        read_keys(path)
    with pytest.raises(StoreError, match="the file of keys is not one"):
        add_key(path, Key(name="new"))
    assert path.read_text() == text


def test_a_file_that_others_may_write_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "keys.json", entry("a", "1"))
    for mode in (0o620, 0o602):
        path.chmod(mode)
        with pytest.raises(StoreError, match="others may write the file of keys"):
            read_keys(path)
    path.chmod(0o644)  # a hash of 32 random bytes is no secret
    assert read_keys(path).of("1") is not None
    with pytest.raises(StoreError, match="cannot read the keys: No such file"):
        read_keys(tmp_path / "none")


def test_every_guess_is_compared_with_every_key_in_constant_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared: list[tuple[str, str]] = []
    compare = hmac.compare_digest

    def counting(one: str, other: str) -> bool:
        compared.append((one, other))
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    keys = Keys([Key(name=f"k{n}", sha256=digest_of(str(n))) for n in range(5)])
    for guess in ("0", "2", "4", "wrong", ""):
        compared.clear()
        found = keys.of(guess)
        assert (found and found.name) == (f"k{guess}" if guess.isdecimal() else None)
        assert [one for one, _ in compared] == [key.sha256 for key in keys.all]
        assert {len(one) for pair in compared for one in pair} == {64}


def test_a_write_that_fails_anywhere_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    first = add_key(path, Key(name="first"))
    before = path.read_bytes()
    with Faults(0, under=tmp_path) as faults:
        add_key(tmp_path / "other.json", Key(name="x"))
    (tmp_path / "other.json").unlink()
    operations = len(faults.names)
    assert operations > 5
    failed = 0
    for number in range(1, operations + 1):
        with Faults(number, under=tmp_path):
            try:
                add_key(path, Key(name="second"))
            except (WriteFailed, StoreError):
                failed += 1
                assert path.read_bytes() == before
        path.write_bytes(before)
        path.chmod(0o600)
    assert failed > operations / 2
    assert read_keys(path).of(first) is not None
