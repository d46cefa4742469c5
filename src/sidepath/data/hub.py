"""Data sets of the Hugging Face hub, by name, through the `datasets` library.

    hub:OWNER/NAME[@REVISION][,config=CONFIG][,split=SPLIT]

The split is "train" where none is given. The library downloads into its own cache (each file
and each converted data set is written aside and renamed when it is whole) and maps it from
there, so that a large data set is not read into memory.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidepath.errors import DataError
from sidepath.store.hub import PREFIX, quiet_hub, reason

GRAMMAR = f"{PREFIX}OWNER/NAME[@REVISION][,config=CONFIG][,split=SPLIT]"
_BATCH = 1024
_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^,@]+))?(?P<options>(?:,.*)?)")


@dataclass(frozen=True)
class HubName:
    """One split of a data set on the hub."""

    name: str
    revision: str | None = None
    config: str | None = None
    split: str = "train"

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        config = f",config={self.config}" if self.config else ""
        return f"{PREFIX}{self.name}{revision}{config},split={self.split}"


def parse_hub_name(text: str) -> HubName:
    """What a name in the grammar above stands for. Raises a `DataError` for any other text."""
    found = _NAME.fullmatch(text.removeprefix(PREFIX))
    options: dict[str, str] = {}
    faults = [] if found else ["no OWNER/NAME"]
    for option in found["options"].split(",")[1:] if found else []:
        key, _, value = option.partition("=")
        if key not in ("config", "split") or not value or key in options:
            faults.append(f'"{option}"')
        options[key] = value
    if found is None or faults:
        raise DataError(
            "not the name of a data set on the hub", found=text, expected=GRAMMAR, faults=faults
        )
    return HubName(found["name"], found["revision"], **options)


def hub_rows(wanted: HubName) -> Generator[tuple[int, Any, None], None, None]:
    """The rows of a split, each with its number from 1.

    Raises:
        DataError: there is no such data set, revision, config or split; it cannot be
            downloaded, or only in part; a file in it is damaged.
    """
    if Path(wanted.name).exists():
        # The library would read that folder instead of the hub, without a word.
        raise DataError(
            "a file or folder here has the name of the data set on the hub",
            where=wanted,
            found=Path(wanted.name).absolute(),
            hint="rename it, or start from another folder",
        )
    rows = _loaded(wanted)
    number = 0
    for batch in rows.with_format("arrow").iter(batch_size=_BATCH):
        for fields in batch.to_pylist():
            number += 1
            yield number, fields, None


def _loaded(wanted: HubName) -> Any:
    import datasets

    with _quiet(datasets):
        try:
            revision = _resolved(wanted)
            rows = datasets.load_dataset(
                wanted.name, wanted.config, split=wanted.split, revision=revision
            )
        # The library lets through whatever its readers and the network raise.
        except Exception as error:
            raise _refused(wanted, reason(error)) from error
    files = [Path(file["filename"]) for file in rows.cache_files]
    if revision is not None and any(revision not in file.parts for file in files):
        # Where the hub fails the library takes whatever revision it has, without a word.
        raise _refused(wanted, f"another revision in the cache: {files[0].parent}")
    return rows


def _resolved(wanted: HubName) -> str | None:
    """The commit that the revision stands for now; offline, what the user wrote."""
    import datasets
    import huggingface_hub

    if datasets.config.HF_HUB_OFFLINE:
        return wanted.revision
    api = huggingface_hub.HfApi(endpoint=datasets.config.HF_ENDPOINT)
    return str(api.dataset_info(wanted.name, revision=wanted.revision, timeout=60).sha)


def _refused(wanted: HubName, found: str) -> DataError:
    return DataError(
        "the data set cannot be had from the hub",
        where=wanted,
        found=found,
        hint="see that name, revision, config and split are right and the hub is reached; "
        "what was downloaded in part is not used",
    )


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No progress bars or warnings of the library between our own lines."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with quiet_hub(datasets.logging):
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()
