"""The verb serve for encoders: embeddings and classes behind HTTP (floor 7)."""

from __future__ import annotations

from pathlib import Path

from sidepath.cli.answers import labels_of
from sidepath.cli.bases import load_classifier, load_encoder, load_tokenizer
from sidepath.cli.gating import renewed_on_hangup, terms_of, web_server
from sidepath.cli.launch import stopped_by_sigterm
from sidepath.cli.output import Report, Table, note
from sidepath.cli.serve_run import HOST, ServeRun
from sidepath.cli.serving import listening, load_all
from sidepath.errors import ConfigError
from sidepath.serve.encoder_http import application
from sidepath.serve.encoders import Encoder
from sidepath.serve.pooling import MODULES, pooling_of
from sidepath.serve.tiers import Memory
from sidepath.store.configs import config_of
from sidepath.store.hub import is_hub

Found = dict[str, str | Path]
CLASSIFIER = "ForSequenceClassification"
ENCODERS = (CLASSIFIER, "ForMaskedLM", "ForPreTraining")


def encodes(folder: Path) -> bool:
    """Whether a base is served for vectors or classes of texts: by its architecture, or because it
    says how it is pooled.
    """
    return (folder / MODULES).is_file() or any(
        name.endswith(ENCODERS) or (name.endswith("Model") and not name.endswith("LMHeadModel"))
        for name in _architectures(folder)
    )


def serve_encoder(run: ServeRun, folder: Path, base: str, found: Found) -> Report:
    """Serve until SIGTERM or Ctrl-C: classes where the base or its adapters have some, vectors
    otherwise.
    """
    given = {"--merge": run.merge, "--allow-loading": run.allow_loading}
    faults = [f"{flag} {value}" for flag, value in given.items() if value is not None]
    if faults:
        raise ConfigError("these are for language models", where=folder, faults=faults)
    terms = terms_of(run)
    with listening(run.port) as bound:
        encoder = _encoder(run, folder, found)
        load_all(encoder.adapters, found, run.allow_other_base)
        server = web_server(run, application(encoder, base, terms.gate))
        renewed = renewed_on_hangup(run, terms.gate)
        with encoder, renewed, stopped_by_sigterm(lambda: None):
            url = f"http://{HOST}:{bound.getsockname()[1]}/v1"
            note(f"serving {base} and {len(found)} adapters at {url}")
            server.run(sockets=[bound])
    counted = {"answered": encoder.answered, "calls": encoder.calls}
    return Report(counted, [Table("", ["texts answered", "calls"], [list(counted.values())])])


def _encoder(run: ServeRun, folder: Path, found: Found) -> Encoder:
    tokenizer = load_tokenizer(folder)
    memory = Memory(run.adapter_memory, run.host_memory)
    options = run.dtype, run.device, run.quantise
    own = any(name.endswith(CLASSIFIER) for name in _architectures(folder))
    places = [place for place in found.values() if not is_hub(place)]
    labels = next((labels for place in places if (labels := labels_of(place))), None)
    if not own and labels is None:
        model = load_encoder(folder, *options)
        pooling = pooling_of(folder)
        return Encoder(model, tokenizer, pooling, memory=memory, laid_out=run.laid_out)
    if own:
        names = config_of(folder).id2label
        labels = tuple(str(names[number]) for number in sorted(names))
    assert labels is not None
    classifier, fresh = load_classifier(folder, labels, tokenizer.pad_token_id, *options)
    return Encoder(
        classifier, tokenizer, None, memory=memory, alone=not fresh, laid_out=run.laid_out
    )


def _architectures(folder: Path) -> list[str]:
    return list(config_of(folder).architectures or [])
