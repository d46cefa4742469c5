"""The gate of the verb serve: its keys, its limits, its connections (floor 7)."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidepath.cli.output import Report, note
from sidepath.cli.runs import BaseRun
from sidepath.cli.serve_run import GateRun, ServeRun
from sidepath.errors import ConfigError, StoreError, in_one_line

if TYPE_CHECKING:
    from sidepath.serve.gate import Gate
    from sidepath.serve.http import Terms


def new_key(run: GateRun) -> Report:
    """Make a key, write its hash to the file, and print it: once, here."""
    from sidepath.serve.keys import Key, add_key

    assert run.new_key is not None
    assert run.keys is not None
    key = Key(
        name=run.new_key,
        admin=run.key_admin,
        models=run.key_models,
        requests_per_minute=run.key_per_minute,
        at_once=run.key_at_once,
    )
    secret = add_key(run.keys, key)
    said = f"the key of {key.name}, shown this once; {run.keys} holds its hash:"
    return Report({"name": key.name, "key": secret, "keys": run.keys}, [said, secret])


def terms_of(run: GateRun) -> Terms:
    """On what terms to answer. Errors: `StoreError` for the keys or the root; `ConfigError` where
    nobody could load what may be loaded.
    """
    from sidepath.serve.bodies import Most
    from sidepath.serve.confined import Loading
    from sidepath.serve.gate import Gate
    from sidepath.serve.http import Terms
    from sidepath.serve.keys import read_keys

    keys = None if run.keys is None else read_keys(run.keys)
    loading = None
    if run.allow_loading is not None:
        if not Path(run.allow_loading).is_dir():
            raise StoreError("no such folder to load adapters from", where=run.allow_loading)
        if keys is not None and not any(key.admin for key in keys.all):
            raise ConfigError(
                "adapters may be loaded, and no key may load any",
                where=run.keys,
                hint=f"sidepath serve --keys {run.keys} --new-key NAME --key-admin",
            )
        loading = Loading(Path(run.allow_loading), run.max_rank, run.max_adapter_bytes)
    most = Most(run.max_prompt_tokens, run.max_new_tokens)
    return Terms(Gate(keys), most, loading, run.drain_seconds)


@contextmanager
def renewed_on_hangup(run: GateRun, gate: Gate) -> Iterator[None]:
    """Within the block SIGHUP reads the file of keys anew, if there is one: it counts from then on.
    A file that cannot be used changes nothing.
    """
    from sidepath.serve.keys import read_keys

    path = run.keys
    if path is None:
        yield
        return

    def renew(*_: object) -> None:
        try:
            gate.renew(read_keys(path))
        except StoreError as error:
            note(f"the keys stay as they were: {in_one_line(error)}")
        else:
            note(f"the keys of {path} count from now on")

    before = signal.signal(signal.SIGHUP, renew)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def refuse_gate(run: ServeRun) -> None:
    """Errors: `ConfigError` that names every setting of this server's gate, and its replicas, for
    another engine.
    """
    of_base = {field.name for field in dataclasses.fields(BaseRun)}
    given = [
        f"--{field.name.replace('_', '-')}"
        for field in dataclasses.fields(GateRun)
        if field.name not in of_base and vars(run)[field.name] != field.default
    ]
    given += ["--replicas"] if run.replicas is not None else []
    if given:
        raise ConfigError(
            "these settings are this server's own: another engine keeps none of them",
            found=", ".join(given),
            hint="leave them out, and put a proxy with keys and limits before that engine",
        )


def web_server(run: GateRun, application: Any) -> Any:
    """Uvicorn's server of an application, within the bounds of `run`."""
    import uvicorn

    from sidepath.serve.connection import HEAD_BYTES, Bounds, bounded

    bounds = Bounds(run.connections, run.head_seconds, run.body_seconds, run.stall_seconds)
    return uvicorn.Server(
        uvicorn.Config(
            application,
            http=bounded(bounds),
            ws="none",
            lifespan="off",
            log_level="error",  # what callers do wrong is counted, not told
            proxy_headers=False,
            server_header=False,
            h11_max_incomplete_event_size=HEAD_BYTES,
            timeout_graceful_shutdown=run.drain_seconds,
        )
    )
