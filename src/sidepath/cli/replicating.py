"""`serve --replicas`: several processes behind one entrance (floor 7)."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch

from sidepath.cli.bases import load_tokenizer
from sidepath.cli.encoding import encodes
from sidepath.cli.gating import renewed_on_hangup, terms_of, web_server
from sidepath.cli.launch import stopped_by_sigterm
from sidepath.cli.output import Report, Table, note
from sidepath.cli.serve_run import HOST, ServeRun
from sidepath.cli.serving import engine_for, listening
from sidepath.errors import ConfigError, MissingExtra
from sidepath.serve.http import chats
from sidepath.serve.ingress import ingress
from sidepath.serve.secluded import secluded
from sidepath.serve.shared import Shared

if TYPE_CHECKING:
    from sidepath.serve.replicas import Scale


def serve_replicas(run: ServeRun, folder: Path, base: str, found: dict[str, str | Path]) -> Report:
    """Serve until SIGTERM or Ctrl-C, with `run.replicas` processes that answer: what was begun by
    then is answered first, and all of them have ended when this returns.
    """
    _refuse(run, folder)
    terms = terms_of(run)
    with secluded(), listening(run.port) as bound, stopped_by_sigterm(_leave):
        scale = _scale(run)
        from sidepath.serve.replicas import running

        make = functools.partial(engine_for, run, folder.resolve(), {})
        with running(make, base, terms.most, scale) as replicas:
            shared = Shared(replicas)
            shared.register_all(found, allow_other_base=run.allow_other_base)
            entrance = ingress(replicas, shared, base, terms, chat=chats(load_tokenizer(folder)))
            server = web_server(run, entrance)
            url = f"http://{HOST}:{bound.getsockname()[1]}/v1"
            note(f"serving {base} and {len(found)} adapters with {scale.count} replicas at {url}")
            renewed = renewed_on_hangup(run, terms.gate)
            # Uvicorn's own takes the place of this SIGTERM meanwhile.
            with renewed, stopped_by_sigterm(lambda: None):
                server.run(sockets=[bound])
            loads = {each.replica: each.load for each in asyncio.run(replicas.standings())}
    rows = [[name, load["steps"], load["answered"]] for name, load in loads.items()]
    return Report({"replicas": loads}, [Table("", ["replica", "steps", "tokens"], rows)])


def _refuse(run: ServeRun, folder: Path) -> None:
    """Errors: one `ConfigError` that names everything asked for that replicas have no form of."""
    faults = []
    if run.merge is not None:
        faults.append(f"--merge {run.merge}: one adapter is merged in one process")
    if encodes(folder):
        faults.append(f"{folder} is an encoder: replicas serve language models")
    if faults:
        raise ConfigError("replicas do not serve this", faults=faults, hint="leave out --replicas")


def _scale(run: ServeRun) -> Scale:
    """How many replicas, and what each takes. Errors: `ConfigError` for more replicas than GPUs;
    `MissingExtra` without Ray.
    """
    assert run.replicas is not None
    gpus = 0 if run.device == "cpu" else torch.cuda.device_count()
    if gpus and run.replicas > gpus:
        raise ConfigError(
            "each replica takes a GPU of its own",
            found=f"--replicas {run.replicas}",
            expected=f"at most {gpus}, or --device cpu",
        )
    try:
        from sidepath.serve.replicas import Scale
    except ModuleNotFoundError as error:
        raise MissingExtra(
            "several replicas are run by Ray Serve, which is not installed",
            found=str(error),
            hint="pip install 'sidepath[serve,scale]'",
        ) from error
    return Scale(run.replicas, run.rows, run.queue, gpus=min(gpus, 1))


def _leave() -> NoReturn:
    """SIGTERM before anything is served: whatever was started ends on the way out."""
    raise SystemExit(143)
