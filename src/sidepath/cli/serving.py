"""The verb serve: one base and a folder of adapters behind OpenAI's routes (floor 7)."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING

from sidepath.cli.bases import base_folder, load_causal, load_tokenizer
from sidepath.cli.gating import new_key, refuse_gate, renewed_on_hangup, terms_of, web_server
from sidepath.cli.launch import stopped_by_sigterm
from sidepath.cli.output import Report, Table, note
from sidepath.cli.serve_run import HOST, ServeRun
from sidepath.cli.surface import Call
from sidepath.cli.vllm_command import vllm_command
from sidepath.errors import ConfigError, MissingExtra, SidepathError, StoreError, in_one_line
from sidepath.store.hub import ADAPTER, is_hub, local, name_of, parse_place

if TYPE_CHECKING:
    from sidepath.serve.adapters import Adapters
    from sidepath.serve.engine import Engine


def serve(call: Call) -> Report:
    """Serve until SIGTERM or Ctrl-C; what was begun by then is answered first, if it ends within
    `drain_seconds`. Or make a key, and serve nothing.
    """
    run = call.settings.build("serve", ServeRun)
    if run.new_key is not None:
        return new_key(run)
    folder = base_folder(run.base)
    base = run.name if run.name is not None else name_of(folder)
    found = folders_in(run.adapters, base)
    if run.engine == "vllm":
        refuse_gate(run)
        places = {name: local(place, ADAPTER) for name, place in found.items()}
        return vllm_command(run, base, folder, places)
    _require_web_server()
    from sidepath.cli.encoding import encodes, serve_encoder

    if run.replicas is not None:
        from sidepath.cli.replicating import serve_replicas

        return serve_replicas(run, folder, base, found)
    if encodes(folder):
        return serve_encoder(run, folder, base, found)
    return _serve_engine(run, folder, base, found)


def _serve_engine(run: ServeRun, folder: Path, base: str, found: dict[str, str | Path]) -> Report:
    """Serve a language model until SIGTERM or Ctrl-C."""
    from sidepath.serve.http import application

    terms = terms_of(run)
    with listening(run.port) as bound:
        engine = engine_for(run, folder, found)
        server = web_server(run, application(engine, base, terms))
        renewed = renewed_on_hangup(run, terms.gate)
        # Uvicorn's own takes the place of this SIGTERM meanwhile.
        with engine, renewed, stopped_by_sigterm(lambda: None):
            url = f"http://{HOST}:{bound.getsockname()[1]}/v1"
            note(f"serving {base} and {len(found)} adapters at {url}")
            server.run(sockets=[bound])
    ended = dict(engine.ended)
    return Report(
        {"ended": ended, "steps": engine.steps, "tokens": engine.new_tokens},
        [Table("", ["requests ended by", "count"], list(ended.items()))],
    )


def _require_web_server() -> None:
    """Errors: `MissingExtra` with the install line."""
    try:
        import uvicorn  # noqa: F401

        import sidepath.serve.http  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra(
            "serving needs a web server", found=str(error), hint="pip install 'sidepath[serve]'"
        ) from error


def engine_for(run: ServeRun, folder: Path, found: dict[str, str | Path]) -> Engine:
    """The engine over the base, with every adapter registered; merged if one is to be."""
    from sidepath.serve.engine import Engine
    from sidepath.serve.scheduler import Limits
    from sidepath.serve.tiers import Memory

    limits = Limits(
        run.rows,
        run.slots,
        run.context,
        run.cached_tokens,
        run.step_tokens,
        run.queue,
        prefixes=run.prefixes,
    )
    model = load_causal(folder, run.dtype, run.device, run.quantise)
    memory = Memory(run.adapter_memory, run.host_memory)
    merged = run.merge is not None
    engine = Engine(
        model, load_tokenizer(folder), limits, memory, merged=merged, laid_out=run.laid_out
    )
    load_all(engine.adapters, found, run.allow_other_base)
    if run.merge is not None:
        engine.adapters.dedicate(run.merge)
    return engine


def listening(port: int) -> socket.socket:
    """A socket that listens on a port of this machine, before anything is loaded: who comes early
    waits.
    """
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((HOST, port))
        bound.listen()
    except OSError as error:
        bound.close()
        raise ConfigError(
            "the port cannot be listened on",
            where=f"{HOST}:{port}",
            found=error.strerror,
            hint="--port 0 takes a free one",
        ) from error
    return bound


def folders_in(given: str | None, base: str) -> dict[str, str | Path]:
    """The adapters' folders, or one's name on the hub, by the names they are served under.

    Hidden folders are left out: a save in progress is one.

    Errors: `StoreError` for a folder without any, and for two of one name; `ConfigError` for one
    that is called as the base.
    """
    if given is None:
        return {}
    if is_hub(given):
        return {parse_place(given).name.partition("/")[2]: given}
    root = Path(given)
    found = _adapters_in(root)
    if not found:
        raise StoreError(
            "the folder holds no adapter",
            where=root,
            expected="folders with adapter_config.json in it, as `sidepath train` writes them",
        )
    if base in found:
        raise ConfigError(
            f'an adapter is called "{base}", as the base is',
            where=found[base],
            hint="give the base another name with --name",
        )
    return found


def _adapters_in(root: Path) -> dict[str, str | Path]:
    """The adapters' folders in one, or that one itself, by name; what is passed over is told."""
    if not root.is_dir():
        raise StoreError("no such folder of adapters", where=root)
    visible = (place for place in root.iterdir() if not place.name.startswith("."))
    found: dict[str, str | Path] = {}
    faults = []
    for place in [root] if _is_adapter(root) else sorted(visible):
        if _is_adapter(place):
            first = found.setdefault(name_of(place), place)
            faults += [] if first is place else [f"{first} and {place}: {name_of(place)}"]
        elif place.is_dir():
            note(f"note: {place} is passed over: it has no adapter_config.json")
    if faults:
        raise StoreError("links lead to adapters of one name", where=root, faults=faults)
    return found


def _is_adapter(place: Path) -> bool:
    return (place / "adapter_config.json").is_file()


def load_all(adapters: Adapters, found: dict[str, str | Path], allow_other_base: bool) -> None:
    """Register every adapter. Errors: one `StoreError` that names each that cannot be served."""
    faults = []
    for name, folder in found.items():
        try:
            adapters.register(name, folder, allow_other_base=allow_other_base)
        except SidepathError as error:
            faults.append(f"{folder}: {in_one_line(error)}")
    if faults:
        raise StoreError(f"{len(faults)} of {len(found)} adapters cannot be served", faults=faults)
