"""From a method's patterns to the places they name, with every fault said at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from sidepath.core.adapted import CHILD
from sidepath.core.views import DenseView, view_of
from sidepath.errors import TargetNotFound, UnsupportedModule, closest
from sidepath.injection.architecture import block_index, dense_views, fused_parts, modules_of
from sidepath.injection.body import body_path, heads_of
from sidepath.injection.places import PRESETS, preset_paths, token_tables
from sidepath.kernels.lowrank import Part
from sidepath.methods.base import HEAD, Method, Selection, Site
from sidepath.methods.lora import name_matches
from sidepath.methods.own import read_by_parent


def resolve(model: nn.Module, config: Method) -> list[Site]:
    """Every place `config` acts on in `model`, in the model's own order. Changes nothing.

    Raises `TargetNotFound` when a pattern of any kind matches nothing, naming all such
    patterns with their nearest names, and `UnsupportedModule` for modules that hold no matrix.
    """
    selection = config.selection()
    modules = dict(modules_of(model))
    whole = _whole_paths(model, modules, selection.train_whole)
    dense: list[Site] = []
    if selection.targets:
        dense = _narrowed(_dense_sites(model, modules, selection), selection, whole)
    _check_patterns(selection.patterns, dense)
    sites = {site.path: site for site in dense}
    if selection.body:
        path = body_path(model)
        sites[path] = Site(path, "body", pattern="body")
    if selection.own:
        sites |= _own_sites(modules, selection, whole)
    sites |= {path: Site(path, "whole", pattern=pattern) for path, pattern in whole.items()}
    if selection.bias != "none":
        sites |= _bias_sites(modules, selection, sites)
    if selection.tokens:
        sites |= _token_sites(model, sites)
    return [sites[path] for path in modules if path in sites]


def _dense_sites(
    model: nn.Module, modules: Mapping[str, nn.Module], selection: Selection
) -> list[Site]:
    views = dense_views(model)
    sites: dict[str, Site] = {}
    faults: list[str] = []
    for pattern in selection.targets:
        paths = _matches(model, pattern, views)
        if not paths:
            _refuse_unsupported(pattern, modules)
            faults.append(_not_found(pattern, views))
        for path in paths:
            view = views.get(path)  # a preset may name modules that hold no matrix
            parts = () if view is None else _parts(model, pattern, view, path)
            sites[path] = Site(path, "dense" if view else "module", parts, pattern)
    _refuse_missed(faults)
    return list(sites.values())


def _matches(model: nn.Module, pattern: str, views: Mapping[str, DenseView]) -> list[str]:
    if pattern in PRESETS:
        return preset_paths(model, pattern, views)
    name = pattern.partition(":")[0]
    return [path for path in views if name_matches(name, path)]


def _parts(model: nn.Module, pattern: str, view: DenseView, path: str) -> tuple[Part, ...]:
    _, colon, names = pattern.partition(":")
    if not colon or pattern in PRESETS:
        return ()
    return fused_parts(model, path, tuple(names.split(",")), view.shape[0])


def _narrowed(dense: list[Site], selection: Selection, whole: Mapping[str, str]) -> list[Site]:
    """The sites left by `exclude`, `layers` and the modules trained whole."""
    kept, faults = dense, []
    for pattern in selection.exclude:
        if not any(name_matches(pattern, site.path) for site in dense):
            faults.append(_not_found(pattern, [site.path for site in dense]))
        kept = [site for site in kept if not name_matches(pattern, site.path)]
    if selection.layers is not None:
        found = {block_index(site.path) for site in kept}
        missing = [str(layer) for layer in selection.layers if layer not in found]
        if missing:
            faults.append(f"layers {', '.join(missing)} hold no target")
        kept = [site for site in kept if block_index(site.path) in selection.layers]
    inside = _in_blocks([site.path for site in kept], selection.blocks)
    kept = [site for site in kept if site.path in inside]
    _refuse_missed(faults)
    roots = tuple(f"{path}." for path in whole)
    kept = [site for site in kept if not f"{site.path}.".startswith(roots)]
    if not kept and not whole:
        raise TargetNotFound("every target is excluded: nothing is left to adapt")
    return kept


def _own_sites(
    modules: Mapping[str, nn.Module], selection: Selection, whole: Mapping[str, str]
) -> dict[str, Site]:
    """Every module that holds parameters itself, in the blocks that are wanted."""
    roots = tuple(f"{path}." for path in whole)
    kept = [
        path
        for path, module in modules.items()
        if any(parameter is not None for parameter in module._parameters.values())
        and not f"{path}.".startswith(roots)
    ]
    kept = [path for path in kept if path in _in_blocks(kept, selection.blocks)]
    _refuse_packed(modules, dict.fromkeys(kept, ""))
    places = dict.fromkeys(_who_reads(path, modules[path]) for path in kept)
    return {path: Site(path, "own", pattern="own") for path in places}


def _who_reads(path: str, module: nn.Module) -> str:
    parent, _, name = path.rpartition(".")
    return parent if read_by_parent(name, module) else path


def _in_blocks(paths: Sequence[str], blocks: tuple[int | None, int | None]) -> set[str]:
    """Those of the paths that lie in a slice of the repeated blocks; all of them for (None, None).

    Errors: `TargetNotFound` where the slice is empty or longer than the model.
    """
    if blocks == (None, None):
        return set(paths)
    found = {path: number for path in paths if (number := block_index(path)) is not None}
    count = 1 + max(found.values(), default=-1)
    wanted = range(count)[slice(*blocks)]
    if not wanted or any(abs(edge) > count for edge in blocks if edge is not None):
        raise TargetNotFound(f"blocks {list(blocks)} are not there: the model has {count}")
    return {path for path, number in found.items() if number in wanted}


def _whole_paths(
    model: nn.Module, modules: Mapping[str, nn.Module], patterns: tuple[str, ...]
) -> dict[str, str]:
    """Modules trained whole, by path; one inside another counts with the outer one."""
    found: dict[str, str] = {}
    faults = []
    for pattern in patterns:
        named = heads_of(model) if pattern == HEAD else []
        paths = named or [path for path in modules if name_matches(pattern, path)]
        if not paths:
            faults.append(_not_found(pattern, modules))
        for path in paths:
            if not any(path.startswith(f"{outer}.") for outer in found):
                found[path] = pattern
    _refuse_missed(faults)
    _refuse_packed(modules, found)
    return found


def _refuse_packed(modules: Mapping[str, nn.Module], whole: Mapping[str, str]) -> None:
    faults = [
        f"{path}.{name}: {parameter.dtype}"
        for path in whole
        for name, parameter in modules[path].named_parameters()
        if CHILD not in name.split(".") and not parameter.is_floating_point()
    ]
    if faults:
        raise UnsupportedModule(
            "quantised modules cannot be trained whole",
            faults=faults,
            hint="adapt them with low-rank targets, or load the base without quantising them",
        )


def _bias_sites(
    modules: Mapping[str, nn.Module], selection: Selection, sites: Mapping[str, Site]
) -> dict[str, Site]:
    """Sites for `bias="all"`; raises when no bias at all is there to train."""
    roots = tuple(f"{path}." for path, site in sites.items() if site.kind == "whole")
    holders = [path for path, module in modules.items() if isinstance(_bias(module), nn.Parameter)]
    inside = [path for path in holders if path in sites and sites[path].kind == "dense"]
    if not (inside if selection.bias == "lora" else holders):
        raise TargetNotFound(
            f'bias="{selection.bias}" finds no bias to train',
            hint='this base has none there: use bias="none", or another method',
        )
    if selection.bias == "lora":
        return {}
    others = [path for path in holders if path not in sites and not f"{path}.".startswith(roots)]
    return {path: Site(path, "bias", pattern="bias") for path in others}


def _token_sites(model: nn.Module, sites: Mapping[str, Site]) -> dict[str, Site]:
    """Sites at the token embedding and the head, and at whatever else holds one of their tables."""
    places = token_tables(model)
    if not places:
        raise TargetNotFound("the model has no embedding of tokens whose rows could be trained")
    roots = tuple(f"{path}." for path, site in sites.items() if site.kind == "whole")
    twice = [
        f"{path}: {sites[path].kind if path in sites else 'whole'}"
        for path in places
        if path in sites or f"{path}.".startswith(roots)
    ]
    if twice:
        raise UnsupportedModule(
            "rows of tokens cannot be trained beside another update of the same table",
            faults=twice,
            hint="leave these modules out of the targets, or leave the rows out",
        )
    return {path: Site(path, "tokens", pattern="tokens") for path in places}


def _bias(module: nn.Module) -> object:
    return module._parameters.get("bias")


def _check_patterns(patterns: Iterable[str], dense: list[Site]) -> None:
    paths = [site.path for site in dense]
    _refuse_missed(
        [
            _not_found(pattern, paths)
            for pattern in patterns
            if not any(name_matches(pattern, path) for path in paths)
        ]
    )


def _refuse_missed(faults: Sequence[str]) -> None:
    """Raise a `TargetNotFound` with everything that was not found, if anything was not."""
    if faults:
        raise TargetNotFound(faults[0], faults=faults[1:])


def _not_found(pattern: str, paths: Iterable[str]) -> str:
    """The design's sentence: which pattern, out of how many, and the closest names that exist."""
    paths = list(paths)
    prefix = "*." if "." in pattern else ""
    names = Counter(prefix + path.rpartition(".")[2] for path in paths)
    close = closest(pattern.partition(":")[0], names)
    counted = [(name, names[name]) for name in close] or names.most_common(8)
    told = ", ".join(f'"{name}" ({count})' for name, count in counted)
    return f'pattern "{pattern}" matched none of {len(paths)} layers. Closest: {told}.'


def _refuse_unsupported(pattern: str, modules: Mapping[str, nn.Module]) -> None:
    name = pattern.partition(":")[0]
    found = [path for path in modules if name_matches(name, path)]
    if pattern in PRESETS:  # linear layers that no view is known for: quantised in another way
        found = [
            path
            for path, module in modules.items()
            if isinstance(module, nn.Linear) and view_of(module) is None
        ]
    if found:
        shown = [f"{path} ({type(modules[path]).__name__})" for path in found]
        raise UnsupportedModule(
            f'pattern "{pattern}" matches {len(found)} modules, none of which holds a matrix '
            "a side path can stand beside",
            expected="Linear, Conv1D, Embedding, Conv1d/2d/3d, and bitsandbytes' Linear4bit",
            faults=shown,
            hint="name the dense layers inside, or train the module whole",
        )
