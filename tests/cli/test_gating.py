"""The gate's settings on the command line: keys that are made, and what cannot be served."""

from __future__ import annotations

import json
import os
import signal
import stat
from pathlib import Path

import pytest

from sidepath.cli.gating import renewed_on_hangup, terms_of
from sidepath.cli.serve_run import ServeRun
from sidepath.errors import UnknownCaller
from sidepath.serve.keys import Key, add_key, read_keys

from .conftest import Run


def test_keys_are_made_and_shown_once(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    flags = "--key-models sql,legal --key-per-minute 60 --key-at-once 4"
    made = run("serve", "--keys", path, "--new-key", "tenant", *flags.split(), "--json")
    assert (made.code, made.err) == (0, "")
    secret = made.document["key"]
    admin = run("serve", "--keys", path, "--new-key", "operator", "--key-admin")
    assert admin.code == 0
    assert admin.out.splitlines()[-1].startswith("sp-")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    tenant = read_keys(path).of(secret)
    assert tenant is not None
    assert (tenant.name, tenant.models, tenant.admin) == ("tenant", ("sql", "legal"), False)
    assert (tenant.requests_per_minute, tenant.at_once) == (60, 4)
    operator = read_keys(path).of(admin.out.splitlines()[-1])
    assert operator is not None
    assert operator.admin
    assert secret not in path.read_text()


def test_a_hangup_reads_the_keys_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.json"
    old = add_key(path, Key(name="old", at_once=2))
    run = ServeRun(keys=str(path))
    gate = terms_of(run).gate
    caller = gate.caller(f"Bearer {old}")
    caller.begin(2)
    with renewed_on_hangup(run, gate):
        new = add_key(path, Key(name="new"))
        with pytest.raises(UnknownCaller):
            gate.caller(f"Bearer {new}")
        os.kill(os.getpid(), signal.SIGHUP)
        assert gate.caller(f"Bearer {new}").name == "new"
        assert gate.caller(f"Bearer {old}") is caller  # what it waits for still counts
        whole = path.read_text()
        path.write_text("{")
        os.kill(os.getpid(), signal.SIGHUP)
        assert gate.caller(f"Bearer {new}").name == "new"
        kept = json.loads(whole)
        path.write_text(json.dumps({**kept, "keys": kept["keys"][1:]}))
        os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(UnknownCaller):
            gate.caller(f"Bearer {old}")
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in said] == [
        f"the keys of {path} count from now on",
        "the keys stay as they were",
        f"the keys of {path} count from now on",
    ]


def test_what_the_gate_refuses(run: Run, tiny_base: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"

    def refused(*more: object) -> str:
        ran = run("serve", "--base", tiny_base, "--port", "0", *more)
        assert (ran.code, ran.out) == (2, "")
        assert "Traceback" not in ran.err
        return ran.err

    assert "impossible value for keys" in refused("--new-key", "x")
    assert "impossible value for keys" in refused("--allow-loading", tmp_path)
    assert "impossible value for key_admin" in refused("--keys", keys, "--key-admin")
    assert "impossible value for key_admin" in refused("--keys", keys, "--key-models", "x")
    others = refused("--engine", "vllm", "--keys", keys, "--stall-seconds", "3")
    assert "found: --keys, --stall-seconds" in others
    assert "impossible value for head_seconds" in refused("--head-seconds", "0")
    assert "cannot read the keys" in refused("--keys", keys)
    assert "impossible value for name" in refused("--keys", keys, "--new-key", "two words")
    assert not keys.exists()
    assert run("serve", "--keys", keys, "--new-key", "tenant").code == 0
    before = keys.read_bytes()
    assert '"tenant" has a key already' in refused("--keys", keys, "--new-key", "tenant")
    both = ("--keys", keys, "--allow-loading")
    assert "no key may load any" in refused(*both, tmp_path)
    assert "no such folder to load adapters from" in refused(*both, tmp_path / "none")
    keys.chmod(0o622)
    assert "others may write the file of keys" in refused("--keys", keys)
    assert keys.read_bytes() == before
    keys.write_text(json.dumps({"format": 1, "keys": [{"name": "a"}, {"nmae": "b"}]}))
    keys.chmod(0o600)
    said = refused("--keys", keys)
    assert "keys[0]: sha256 missing" in said
    assert "keys[1]: name and sha256 missing" in said
