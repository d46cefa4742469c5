"""The verb doctor: what is installed, what is missing, what the machine computes with (floor 7).

It has to work where the installation does not: nothing but the standard library, packaging and our
own errors is imported before it is known whether it can be.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from sidepath import __version__
from sidepath.cli.output import Report, Table
from sidepath.cli.surface import Call
from sidepath.errors import MissingExtra, in_one_line

PURPOSES: Mapping[str, str] = {
    "bench": "figures beside PEFT",
    "browser": "tests that open reports in a browser",
    "dev": "everything that working on Sidepath takes",
    "docs": "building the documentation",
    "gguf": "adapters for llama.cpp and Ollama",
    "quant": "4-bit bases, 8-bit optimisers",
    "report": "pictures in reports",
    "scale": "replicas of the server, trials on Ray",
    "scale-test": "tests of replicas",
    "serve": "the server",
    "test": "the tests",
    "track": "TensorBoard",
    "triton": "kernels for GPUs",
}
"""What each extra of the package is for."""
GIB = 2**30


@dataclass(frozen=True)
class Need:
    """A package that is required, and what is installed of it."""

    name: str
    wanted: str
    """Which versions, as in `>=2.10`; empty for any."""
    found: str | None

    @property
    def met(self) -> bool:
        """Whether a version that is wanted is installed."""
        requirement = Requirement(f"{self.name}{self.wanted}")
        return self.found is not None and requirement.specifier.contains(
            self.found, prereleases=True
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"name": self.name, "wanted": self.wanted, "found": self.found, "met": self.met}


def doctor(call: Call) -> Report:
    """Versions, devices, memory, extras that are missing, and the command that installs each."""
    lines = requirements()
    needs = needed(lines)
    torch, why = imported()
    usable = {"cuda": cuda(torch), "bitsandbytes": packing(torch), "triton": triton(torch)}
    faults = [
        *(() if lines else ("sidepath is not installed as a package: pip install .",)),
        *(() if torch is not None else (f"torch cannot be imported: {why}",)),
        *(
            f"{need.name}{need.wanted} is needed, found {need.found or 'none'}: "
            f"pip install '{need.name}{need.wanted}'"
            for need in needs
            if not need.met
        ),
    ]
    document = {
        "sidepath": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": [need.as_dict() for need in needs],
        "extras": [
            {"name": name, "purpose": PURPOSES.get(name, ""), **_missing(name, lines)}
            for name in extras(lines)
        ],
        "devices": devices(torch),
        "memory": memory(),
        "usable": usable,
        "faults": faults,
    }
    return Report(document, told(document))


def requirements() -> tuple[Requirement, ...]:
    """What the installed package says it needs; nothing where it is not installed."""
    try:
        return tuple(Requirement(line) for line in metadata.requires("sidepath") or ())
    except metadata.PackageNotFoundError:
        return ()


def needed(lines: Iterable[Requirement], extra: str = "") -> list[Need]:
    """What is needed on this machine: by the package itself, or by one of its extras alone."""
    found: dict[str, Need] = {}
    for line in lines:
        always = line.marker is None or line.marker.evaluate({"extra": ""})
        if line.marker is not None and not line.marker.evaluate({"extra": extra}):
            continue
        if always and extra:
            continue
        if line.name == "sidepath":  # an extra that is made of others
            parts = [need for part in sorted(line.extras) for need in needed(lines, part)]
        else:
            parts = [Need(line.name, str(line.specifier), version_of(line.name))]
        found |= {need.name: need for need in parts}
    return list(found.values())


def extras(lines: Iterable[Requirement]) -> list[str]:
    """The extras that the installed package has."""
    known = metadata.metadata("sidepath").get_all("Provides-Extra") if tuple(lines) else None
    return sorted(known or ())


def version_of(name: str) -> str | None:
    """The version of a package that is installed; None where it is not."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _missing(name: str, lines: Sequence[Requirement]) -> dict[str, Any]:
    missing = [need.name for need in needed(lines, name) if not need.met]
    return {"missing": missing, "install": f"pip install 'sidepath[{name}]'" if missing else None}


def imported() -> tuple[Any, str]:
    """torch; or None, and why it cannot be imported."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return None, in_one_line(error)
    return torch, ""


def devices(torch: Any) -> list[dict[str, Any]]:
    """What there is to compute with: the processor, and each GPU that torch sees."""
    threads = None if torch is None else torch.get_num_threads()
    found: list[dict[str, Any]] = [
        {"name": "cpu", "what": platform.machine(), "cores": os.cpu_count(), "threads": threads}
    ]
    if torch is not None and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            own = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            found.append(
                {
                    "name": f"cuda:{index}",
                    "what": own.name,
                    "capability": f"{own.major}.{own.minor}",
                    "memory": {"total": total, "available": free},
                }
            )
    return found


def memory() -> dict[str, int | None]:
    """Memory of the machine in bytes; None where the system does not say."""
    place = Path("/proc/meminfo")
    lines = place.read_text().splitlines() if place.is_file() else []
    known = {line.partition(":")[0]: line.split()[1] for line in lines}
    return {
        name: int(known[key]) * 1024 if key in known else None
        for name, key in (("total", "MemTotal"), ("available", "MemAvailable"))
    }


def cuda(torch: Any) -> dict[str, Any]:
    """Whether torch computes on a GPU."""
    if torch is None:
        return _no("torch cannot be imported")
    if torch.version.cuda is None:
        return _no(f"torch {torch.__version__} is a build without CUDA")
    if not torch.cuda.is_available():
        return _no(f"torch is built for CUDA {torch.version.cuda} and sees no GPU")
    return {"usable": True, "why": f"CUDA {torch.version.cuda}"}


def packing(torch: Any) -> dict[str, Any]:
    """Whether bitsandbytes packs a matrix into 4 bits and back on the device at hand: tried."""
    if torch is None:
        return _no("torch cannot be imported")
    from sidepath.core.quant import require_bitsandbytes

    try:
        functional = require_bitsandbytes().functional
        device = "cuda" if torch.cuda.is_available() else "cpu"
        W = torch.linspace(-1, 1, 4096, device=device).view(64, 64)
        codes, state = functional.quantize_4bit(W, quant_type="nf4")
        error = float((functional.dequantize_4bit(codes, state) - W).abs().max())
    except MissingExtra:
        return _no("not installed")
    except Exception as fault:  # a broken library may raise anything
        return _no(f"{type(fault).__name__}: {in_one_line(fault)}")
    # Neighbouring levels of NF4 are at most 0.31 apart.
    return {"usable": error < 0.16, "why": f"packs and unpacks on {device}, off by {error:.2f}"}


def triton(torch: Any) -> dict[str, Any]:
    """Whether Triton's kernels may take the place of the plain forms."""
    version = version_of("triton")
    if version is None:
        return _no("not installed")
    if not cuda(torch)["usable"]:
        return _no(f"{version} is installed, and there is no GPU: plain forms are used")
    return {"usable": True, "why": f"{version}; each kernel is tried beside the plain form first"}


def _no(why: str) -> dict[str, Any]:
    return {"usable": False, "why": why}


def told(document: Mapping[str, Any]) -> list[str | Table]:
    """The same for people."""
    packages = [
        [one["name"], one["wanted"], one["found"] or "missing"] for one in document["packages"]
    ]
    extra_rows = [
        [one["name"], one["purpose"], _shortly(one["missing"]), one["install"]]
        for one in document["extras"]
    ]
    usable = [[name, one["usable"], one["why"]] for name, one in document["usable"].items()]
    return [
        f"sidepath {document['sidepath']}, Python {document['python']}, {document['platform']}",
        "",
        Table("packages", ["package", "needed", "installed"], packages),
        "",
        Table("extras", ["extra", "for", "missing", "install with"], extra_rows),
        "",
        Table("devices", ["device", "what", "memory"], _device_rows(document)),
        "",
        Table("usable", ["what", "usable", "why"], usable),
        "",
        *(document["faults"] or ["nothing that is needed is missing"]),
    ]


def _shortly(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = [f"and {len(names) - 3} more"] if len(names) > 4 else []
    return ", ".join([*(names[:3] if more else names), *more]) or "-"


def _device_rows(document: Mapping[str, Any]) -> list[list[object]]:
    rows: list[list[object]] = []
    for one in document["devices"]:
        size = one.get("memory", document["memory"])
        what = one["what"]
        if one["name"] == "cpu":
            what = f"{what}, {one['cores']} cores, {one['threads']} threads"
        rows.append([one["name"], what, f"{_gib(size['available'])} of {_gib(size['total'])} free"])
    return rows


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / GIB:.1f} GiB"
