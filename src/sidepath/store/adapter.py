"""An adapter as users hold it: put on a model, saved to a folder, loaded from one (floor 4)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sidepath.core.delta import Delta
from sidepath.errors import MergeError, SidepathNotice, WrongBase
from sidepath.injection.registry import Installed, check_name, registry_of, require_registry
from sidepath.injection.surgery import activate, put_in, refuse_merged, remove
from sidepath.injection.targets import resolve
from sidepath.methods.base import Method, Site
from sidepath.store.contents import Contents, read_folder
from sidepath.store.fingerprint import fingerprint, same_base
from sidepath.store.folder import publish, sha256_file
from sidepath.store.hub import ADAPTER, local, name_of
from sidepath.store.loading import Loaded
from sidepath.store.new_tokens import extend, with_rows
from sidepath.store.originals import Originals, residual_source, start_at_residuals
from sidepath.store.parity import PARITY, read_parity
from sidepath.store.peft_format import WEIGHTS
from sidepath.store.saving import (
    base_name,
    loaded_from,
    merged_record,
    replaceable,
    write_adapter,
)


@dataclass(frozen=True)
class Adapter:
    """A handle to one adapter on a model; it holds no tensor of its own."""

    name: str
    model: nn.Module

    @property
    def installed(self) -> Installed:
        """What the model holds under this name. Errors: `UnknownAdapter` once it is removed."""
        return require_registry(self.model).adapter(self.name)

    @property
    def config(self) -> Method:
        """The method's settings."""
        return self.installed.config

    @property
    def deltas(self) -> Mapping[str, Delta]:
        """The deltas by the path of the module they stand beside."""
        return self.installed.deltas

    @property
    def record(self) -> Mapping[str, Any]:
        """How the adapter came to be, as saved with it."""
        return self.installed.record

    @property
    def tokens(self) -> Mapping[str, int]:
        """Ids of the tokens that the adapter brings, by their texts."""
        return self.installed.tokens

    def extend(self, tokenizer: Any) -> Any:
        """Add the tokens that the adapter brings to its base's tokenizer, in place; returns that.

        Errors: `StoreError` where the tokenizer would give them other ids.
        """
        extend(tokenizer, self.tokens)
        return tokenizer

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every trained parameter of the adapter."""
        return self.installed.parameters()

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        metrics: Mapping[str, Any] | None = None,
        record: Mapping[str, Any] | None = None,
        files: Mapping[str, str] | None = None,
    ) -> Path:
        """Write the adapter's folder, all or nothing; an earlier save there is replaced.

        Written: the deltas (`adapter_model.safetensors`, PEFT's names), `adapter_config.json`,
        `added_tokens.json` where it brings tokens, `README.md`, `files` (more text files by name,
        such as the settings of the run), and last `sidepath.json` with the base's fingerprint,
        `metrics` and `record` (data digest, seed, command, ...; kept with what an earlier save
        recorded). The model is not changed, and nothing is merged. Returns the folder.

        Errors: `WriteFailed` (disk full, no permission, ...), `StoreError` for a folder that
        holds other files.
        """
        installed = self.installed
        made = merged_record(installed.record, metrics, record)
        with publish(folder, manifests=(), replace=replaceable) as temporary:
            write_adapter(self.model, installed, temporary, files or {}, made)
        installed.record = made
        return Path(folder)


def inject(
    model: nn.Module,
    config: Method,
    name: str = "default",
    *,
    originals: Originals = None,
    new_tokens: Mapping[str, int] | None = None,
) -> Adapter:
    """Stand a fresh adapter beside the modules `config` names. Changes `model` in place.

    The base is frozen, its outputs stay equal to the bit until the adapter is trained. It
    becomes the active one, so that what is trained next is what was injected last.

    `PromptTuning` and `PrefixTuning` move the outputs, by the positions they put before each row;
    and `LoRA(start="loftq")`: towards those of the unquantised base, whose weights it reads from
    `originals`: a transformers folder (the one the model was loaded from when not given) or the
    tensors by parameter name.

    `new_tokens` are tokens that the base does not know, by their texts and ids (`add_tokens` gives
    a tokenizer's): their rows of the embedding and the head are trained with a LoRA, and saved with
    it. The base's own table stays as it is and as long as it is.

    Errors: `TargetNotFound`, `UnsupportedModule`, `NameTaken`, `BadName`; `MergeError` while an
    adapter is merged in; `ConfigError` and `StoreError` for a start from originals without any.
    """
    check_name(registry_of(model), name)
    refuse_merged(registry_of(model), f'"{name}" cannot be injected')
    config = with_rows(config, new_tokens or {})
    sites = resolve(model, config)
    residuals = residual_source(model, config, sites, originals)
    installed = put_in(model, config, name, sites)
    try:
        start_at_residuals(installed, residuals)
    except BaseException:
        remove(model, name)
        raise
    installed.tokens = dict(new_tokens or {})
    activate(model, name)
    return Adapter(name, model)


def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str | None = None,
    *,
    allow_other_base: bool = False,
    trainable: bool = False,
) -> Adapter:
    """Load an adapter's folder, ours or PEFT's, onto its base. Changes `model` in place.

    `folder` may be a name on the hub, `hub:OWNER/NAME[@REVISION]`: see `store.hub.fetch`.
    Everything is checked before the model is touched. Before memory is allocated: the manifest's
    digest and those of the other files, header, settings, keys, shapes, dtypes, sizes, then the
    base's fingerprint (read afresh each time; `allow_other_base` skips it). The weights' digest
    and that every value is finite are checked on the bytes that were loaded, which then are the
    adapter's memory: each byte is read once, and another core takes the digest while the deltas
    are made. The cost does not grow with what is loaded. `name` is the folder's own by default,
    or the repository's.
    The first adapter on a model becomes active. Its parameters require gradients if `trainable`.

    A PEFT folder has no fingerprint: one `SidepathNotice` says so.

    Errors: `DamagedAdapter` with all faults, `WrongBase`, `StoreError` (`HubError`), `BadName`,
    `NameTaken`;
    `MergeError` while an adapter is merged in, or when this one is merged into the base's folder.
    """
    folder = local(folder, ADAPTER)
    name = name if name is not None else name_of(folder)
    registry = registry_of(model)
    check_name(registry, name)
    refuse_merged(registry, f'"{name}" cannot be loaded')
    with opened(model, folder, allow_other_base=allow_other_base) as ready:
        return ready.stand_up(name, trainable)


@dataclass(frozen=True)
class Opened:
    """An adapter whose folder was read and checked against the model, and that is not on it yet."""

    model: nn.Module
    contents: Contents
    loaded: Loaded

    def stand_up(self, name: str, trainable: bool = False) -> Adapter:
        """Put it on the model, once its bytes are known to be the right ones.

        Errors: `DamagedAdapter`, `BadName`, `NameTaken`; `MergeError` while one is merged in.
        """
        contents = self.contents
        tensors = contents.placed(self.loaded.tensors)
        adapter = stand_up(
            self.model,
            contents.config,
            name,
            contents.sites,
            tensors,
            trainable,
            self.loaded.settle,
        )
        if contents.manifest is not None:
            adapter.installed.record = dict(contents.manifest.record)
        adapter.installed.tokens = contents.tokens
        return adapter


@contextmanager
def opened(model: nn.Module, folder: Path, *, allow_other_base: bool = False) -> Iterator[Opened]:
    """Read and check an adapter's folder, as `load` does; the model is looked at, not changed.

    Errors: `DamagedAdapter` with all faults, `WrongBase`, `StoreError`; `MergeError` when this
    adapter is merged into the base's folder.
    """
    contents = read_folder(model, folder)
    _refuse_merged_base(model, contents)
    _check_base(model, contents, folder, allow_other_base)
    with contents.loading(model) as loaded:
        yield Opened(model, contents, loaded)


def stand_up(
    model: nn.Module,
    config: Method,
    name: str,
    sites: Sequence[Site],
    tensors: Mapping[str, Mapping[str, Tensor]],
    trainable: bool,
    settle: Callable[[], None] | None = None,
) -> Adapter:
    """Put in an adapter made of `tensors` (by module path; kept, not copied, where they fit).

    The first adapter on a model becomes active. Nothing random is drawn.
    """
    first = registry_of(model) is None
    put_in(model, config, name, sites, tensors=tensors, trainable=trainable, settle=settle)
    if first:
        activate(model, name)
    return Adapter(name, model)


def _refuse_merged_base(model: nn.Module, contents: Contents) -> None:
    name = loaded_from(model)
    parity = Path(name) / PARITY if name else None
    if parity is None or not parity.is_file():
        return
    merged, _ = read_parity(parity)
    recorded = contents.manifest
    digest = recorded.files[WEIGHTS][1] if recorded else sha256_file(contents.path)
    if digest in merged:
        raise MergeError(
            f'this adapter is merged into the base already, as "{merged[digest]}"',
            where=name,
            hint="load it onto the base it was trained on, or use the merged model as it is",
        )


def _check_base(model: nn.Module, contents: Contents, folder: Path, allow_other: bool) -> None:
    if allow_other:
        return
    if contents.manifest is None:
        warnings.warn(
            f"{folder}: no sidepath.json: its base could not be verified",
            SidepathNotice,
            stacklevel=5,
        )
        return
    recorded = contents.manifest.base
    found = fingerprint(model)
    faults = same_base(recorded, found)
    if faults:
        raise WrongBase(
            "the adapter was made for another base",
            where=folder,
            found=f"{base_name(model) or 'a model'} with fingerprint {found.id}",
            expected=f"{contents.manifest.base_name or 'a base'} with fingerprint {recorded.id}",
            faults=faults,
            hint="load it onto its own base; a head that is drawn anew at each load must be "
            "trained whole; allow_other_base=True (--allow-other-base) loads it all the same",
        )
