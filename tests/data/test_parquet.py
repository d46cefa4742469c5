from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from sidepath.data.dataset import load_data
from sidepath.errors import DataError
from tests.training.kit import supervised_text, whole_text


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def test_rows_of_all_row_groups(tokenizer: Any, tmp_path: Path) -> None:
    columns = {"prompt": [f"p{at}" for at in range(3000)], "completion": ["x"] * 3000}
    path = write(tmp_path / "a.parquet", columns, row_group_size=700)
    data = load_data(path, tokenizer)
    assert len(data) == 3000
    assert whole_text(data, 2999) == "<s>p2999x</s>"
    assert data.place(2999) == f"{path}, row 3000"
    assert len(load_data(path, tokenizer, limit=5)) == 5


def test_nested_messages_and_their_nulls(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.tool_calls is defined %}[call]{% endif %}"
        "[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    talk = [
        {"role": "user", "content": "hi", "tool_calls": None},
        {"role": "assistant", "content": "yo", "tool_calls": None},
    ]
    kind = pyarrow.list_(
        pyarrow.struct(
            {
                "role": pyarrow.string(),
                "content": pyarrow.string(),
                "tool_calls": pyarrow.list_(pyarrow.string()),
            }
        )
    )
    path = write(tmp_path / "a.parquet", {"messages": pyarrow.array([talk], kind)})
    data = load_data(path, tokenizer)
    assert whole_text(data) == "[user]hi</s>[assistant]yo</s>"
    assert supervised_text(data) == "yo</s>"


def test_wrong_types_are_faults_by_row(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"prompt": ["a", None], "completion": [1.5, 2.5]})
    with pytest.raises(DataError) as caught:
        load_data(path, tokenizer)
    assert caught.value.faults == [
        'row 1: "completion": expected text, found float',
        'row 2: "prompt": expected text, found NoneType',
        'row 2: "completion": expected text, found float',
    ]
    path = write(tmp_path / "b.parquet", {"text": ["a", "b"], "label": [0.5, 1.0]})
    with pytest.raises(DataError, match=r'row 1: "label": expected a name or an integer'):
        load_data(path, tokenizer)


def test_bytes_that_are_no_text(tokenizer: Any, tmp_path: Path) -> None:
    raw = pyarrow.array([b"ok", b"\xff\xfe"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.buffers())
    with pytest.raises(DataError, match="damaged, or is none"):
        load_data(write(tmp_path / "a.parquet", {"text": text}), tokenizer)
    with pytest.raises(DataError, match=r'row 1: "text": expected text, found bytes'):
        load_data(write(tmp_path / "b.parquet", {"text": raw}), tokenizer)


@pytest.mark.parametrize("keep", [0, 4, 5000, -10])
def test_truncated_files(tokenizer: Any, tmp_path: Path, keep: int) -> None:
    path = write(tmp_path / "a.parquet", {"text": [f"row {at}" for at in range(5000)]})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="damaged, or is none") as caught:
        load_data(path, tokenizer)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("compression", ["snappy", "none"])
def test_a_damaged_page_is_an_error(tokenizer: Any, tmp_path: Path, compression: str) -> None:
    path = write(
        tmp_path / "a.parquet",
        {"text": [f"row {at}" for at in range(20_000)]},
        row_group_size=4_000,
        use_dictionary=False,
        compression=compression,
        write_page_checksum=True,
    )
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be read|damaged"):
        load_data(path, tokenizer)


def test_no_rows(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"text": pyarrow.array([], pyarrow.string())})
    with pytest.raises(DataError, match="there are no rows"):
        load_data(path, tokenizer)
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        load_data(tmp_path / "folder.parquet", tokenizer)
