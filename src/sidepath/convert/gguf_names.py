"""llama.cpp's names for a base's matrices, and the order of their rows (floor 5).

Dimensions: O rows of a matrix, H heads, D numbers a head.

llama.cpp turns a head's numbers in neighbouring pairs, transformers in halves. For the families
marked here its converter changes the rows' order of queries' and keys' weights, head by head:
(H, 2, D/2) becomes (H, D/2, 2); so B's rows change with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sidepath.convert.portable import Base
from sidepath.core.views import view_of
from sidepath.errors import MissingExtra, StoreError
from sidepath.injection.architecture import block_index, modules_of

ARCHITECTURES: Mapping[str, tuple[str, bool]] = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "gemma": ("gemma", False),
    "gemma2": ("gemma2", False),
    "phi3": ("phi3", False),
    "starcoder2": ("starcoder2", False),
}
"""By transformers' `model_type`: llama.cpp's name, and whether rows change their order. Only
families whose linear layers llama.cpp's converter otherwise takes as they are."""

MOST_BLOCKS = 2048
HEADS, KEY_HEADS = "{}.attention.head_count", "{}.attention.head_count_kv"


@dataclass(frozen=True)
class Heads:
    """How many heads the queries have, and the keys."""

    query: int
    key: int

    def of(self, name: str) -> int | None:
        """The heads of a matrix by llama.cpp's name; None where its rows have no such order."""
        kind = name.removesuffix(".weight").rpartition(".")[2]
        return {"attn_q": self.query, "attn_k": self.key}.get(kind)


def require_gguf() -> Any:
    """The gguf package. Errors: `MissingExtra`."""
    try:
        import gguf
    except ImportError as error:
        raise MissingExtra(
            "GGUF files need the gguf package", hint="pip install 'sidepath[gguf]'"
        ) from error
    return gguf


def architecture_of(base: Base) -> tuple[str, Heads | None]:
    """llama.cpp's name of the base's architecture, and its heads where rows change their order.

    Errors: `StoreError` for a family that is not in the table.
    """
    config: Any = base.model.config
    config = config.get_text_config()
    if config.model_type not in ARCHITECTURES:
        raise StoreError(
            f"no GGUF names are known for bases of the type {config.model_type}",
            where=base.folder,
            expected=", ".join(ARCHITECTURES),
            hint="merge the adapter, and convert the merged model with llama.cpp's own converter",
        )
    name, permuted = ARCHITECTURES[config.model_type]
    heads = Heads(config.num_attention_heads, config.num_key_value_heads) if permuted else None
    return name, heads


def permuted(architecture: str) -> bool:
    """Whether rows change their order in one of llama.cpp's architectures."""
    return any(change for name, change in ARCHITECTURES.values() if name == architecture)


def tensor_names(architecture: str, paths: Iterable[str]) -> dict[str, str]:
    """llama.cpp's tensor name of each module path; paths that have none are left out."""
    gguf: Any = require_gguf()
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in kinds:
        raise StoreError("an architecture that the gguf package does not know", found=architecture)
    paths = list(paths)
    blocks = 1 + max((block_index(path) or 0 for path in paths), default=0)
    if blocks > MOST_BLOCKS:
        raise StoreError(f"a base of {blocks} blocks", expected=f"at most {MOST_BLOCKS}")
    table = gguf.get_tensor_name_map(kinds[architecture], blocks)
    found = {path: table.get_name(f"{path}.weight", try_suffixes=(".weight",)) for path in paths}
    return {path: name for path, name in found.items() if name is not None}


def matrices_of(base: Base) -> list[str]:
    """The paths of a base's dense layers."""
    return [path for path, module in modules_of(base.model) if view_of(module) is not None]


def rows_in_pairs(B_OR: Tensor, heads: int) -> Tensor:
    """Rows from halves to neighbouring pairs, head by head: transformers' order to llama.cpp's."""
    split = B_OR.reshape(heads, 2, len(B_OR) // heads // 2, -1)
    return split.swapaxes(1, 2).reshape(B_OR.shape)


def rows_in_halves(B_OR: Tensor, heads: int) -> Tensor:
    """The inverse of `rows_in_pairs`."""
    split = B_OR.reshape(heads, len(B_OR) // heads // 2, 2, -1)
    return split.swapaxes(1, 2).reshape(B_OR.shape)
