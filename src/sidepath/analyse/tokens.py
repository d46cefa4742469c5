"""The rows of tokens in a saved adapter, read without its base (floor 5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sidepath.errors import DamagedAdapter
from sidepath.store.loading import load_tensors
from sidepath.store.new_tokens import read_tokens
from sidepath.store.peft_format import CONFIG, PREFIX, TOKENS, WEIGHTS
from sidepath.store.peft_reading import trusted_settings
from sidepath.store.tensors import file_inside, read_header, there


def rows_of_tokens(folder: Path) -> list[dict[str, Any]]:
    """Each trained row of an adapter's folder: its token's id and text (None where the folder names
    none), the module that it stands at, and its norm. Empty where there are none.

    Errors: `DamagedAdapter` where ids and rows do not fit together.
    """
    if not there(folder / CONFIG):  # a file of loralib's, or a method without such rows
        return []
    path = file_inside(folder, WEIGHTS)
    header = {key: one for key, one in read_header(path).items() if key.endswith(TOKENS)}
    ids = trusted_settings(folder)[1].token_rows
    named, faults = read_tokens(folder, ids, ours=False)
    faults += [
        f"{key}: shape {list(one.shape)}, for {len(ids)} tokens"
        for key, one in header.items()
        if len(one.shape) != 2 or one.shape[0] != len(ids)
    ]
    if faults:
        raise DamagedAdapter("the adapter's rows of tokens do not fit", where=folder, faults=faults)
    texts = {i: text for text, i in named.items()}
    found = []
    for key, rows_ND in load_tensors(path, header).items():
        module = key.removeprefix(PREFIX).removesuffix(TOKENS)
        norms = rows_ND.double().norm(dim=1).tolist()
        found += [
            {"token": texts.get(i), "id": i, "module": module, "norm": norm}
            for i, norm in zip(ids, norms, strict=True)
        ]
    return found
