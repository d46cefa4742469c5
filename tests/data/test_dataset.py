from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sidepath.data.dataset import Data, load_data
from sidepath.errors import DataError, TrainError
from tests.tokens import byte_tokenizer
from tests.training.kit import supervised_text, whole_text


def test_only_completion_and_end_are_supervised(tokenizer: Any) -> None:
    data = load_data([{"prompt": "ab", "completion": "xyz"}], tokenizer)
    assert whole_text(data) == "<s>abxyz</s>"
    assert supervised_text(data) == "xyz</s>"
    assert data.examples[0].prompt_length == 3
    audit = data.audit.as_dict()
    assert audit["rows"] == 1
    assert audit["supervised_share"] == pytest.approx(4 / 7)
    assert audit["end_token_share"] == 1.0
    assert audit["truncated"] == 0
    assert "⟦xyz</s>⟧" in audit["samples"][0]


def test_plain_text_is_supervised_whole(tokenizer: Any) -> None:
    data = load_data([{"text": "hello"}], tokenizer)
    assert supervised_text(data) == "hello</s>"
    assert not data.examples[0].supervised_T[0]


def test_labels_are_sorted_and_stable(tokenizer: Any) -> None:
    rows = [{"text": "a", "label": label} for label in ("10", "9", "9")]
    data = load_data(rows, tokenizer)
    assert (data.task, data.labels) == ("classify", ("9", "10"))
    assert [example.label for example in data.examples] == [1, 0, 0]
    assert data.audit.labels == {"9": 2, "10": 1}
    named = load_data([{"text": "a", "label": 1}], tokenizer, labels=("bad", "good"))
    assert named.examples[0].label == 1
    with pytest.raises(DataError, match=r'row 3: label "ugly" is out of range'):
        load_data(
            [{"text": "a", "label": name} for name in ("bad", "good", "ugly")],
            tokenizer,
            labels=("bad", "good"),
        )


def test_text_with_label_can_be_read_as_plain_text(tokenizer: Any) -> None:
    rows = [{"text": "a", "label": 1}]
    assert load_data(rows, tokenizer, task="causal").schema == "text"
    with pytest.raises(DataError, match=r"text\+label"):
        load_data([{"text": "a"}], tokenizer, task="classify")


def test_long_rows_lose_the_left_of_their_prompt_and_are_counted(tokenizer: Any) -> None:
    rows = [
        {"prompt": "abcdef", "completion": "xyz"},
        {"prompt": "ab", "completion": "xyz"},
        {"prompt": "a", "completion": "x" * 9},
        {"prompt": "a", "completion": "  "},
    ]
    data = load_data(rows, tokenizer, max_tokens=8)
    assert [whole_text(data, row) for row in range(2)] == ["<s>defxyz</s>", "<s>abxyz</s>"]
    audit = data.audit
    assert (audit.rows_read, audit.rows, audit.truncated) == (4, 2, 1)
    assert (audit.over_long, audit.empty, audit.longest) == (1, 1, 8)
    assert "truncated" in str(audit)


def test_the_tokenizers_own_limit_holds(tokenizer: Any) -> None:
    tokenizer.model_max_length = 6
    data = load_data([{"text": "abcdefghij"}], tokenizer)
    assert whole_text(data) == "<s>abcde"
    assert (data.audit.max_tokens, data.audit.end_token_share) == (6, 0.0)


def test_long_labelled_text_keeps_the_tokenizers_frame(tokenizer: Any) -> None:
    data = load_data([{"text": "abcdefghij", "label": "x"}], tokenizer, max_tokens=5)
    assert whole_text(data) == "<s>abcd"
    assert data.audit.truncated == 1


def test_duplicates_are_counted_and_kept(tokenizer: Any) -> None:
    data = load_data([{"prompt": "a", "completion": "b"}] * 3, tokenizer)
    assert (len(data), data.audit.duplicates) == (3, 2)


def test_columns_are_mapped(tokenizer: Any) -> None:
    columns = {"prompt": "mr", "completion": "ref"}
    data = load_data([{"mr": "a", "ref": "b"}], tokenizer, columns=columns)
    assert whole_text(data) == "<s>ab</s>"
    with pytest.raises(DataError, match='did you mean "mr"'):
        load_data([{"mr": "a", "ref": "b"}], tokenizer, columns={**columns, "prompt": "mrr"})
    with pytest.raises(DataError, match="unknown field on the left"):
        load_data([{"mr": "a"}], tokenizer, columns={"prmpt": "mr"})


def test_all_faults_at_once_in_order(tokenizer: Any, tmp_path: Path) -> None:
    good = json.dumps({"prompt": "a", "completion": "b"})
    bad = [
        '{"prompt": "a"}',
        '{"text": "a"}',
        '{"prompt": 3, "completion": "b"}',
        '{"prompt": "\\ud800", "completion": "b"}',
        "{oh",
        '{"prompt": "\udcff", "completion": "b"}',
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\n".join([good, *bad, good]).encode(errors="surrogateescape"))
    with pytest.raises(DataError) as caught:
        load_data(path, tokenizer)
    faults = caught.value.faults
    assert [fault.split(":")[0] for fault in faults] == [f"line {line}" for line in range(2, 8)]
    assert 'no "completion"' in faults[0]
    assert "kind text among rows of kind completion" in faults[1]
    assert "found int" in faults[2]
    assert "surrogate" in faults[3]
    assert "not JSON" in faults[4]
    assert "not UTF-8" in faults[5]
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "\n\n", "prompt,completion\n"])
def test_an_empty_file_is_an_error(tokenizer: Any, tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="there are no rows"):
        load_data(tmp_path / "rows.csv", tokenizer)


def test_rows_without_a_schema_name_what_was_found(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="found: answer, question"):
        load_data([{"question": "a", "answer": "b"}], tokenizer)


def test_nothing_left_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="2 over-long"):
        load_data([{"prompt": "a", "completion": "b" * 50}] * 2, tokenizer, max_tokens=8)


def test_a_tokenizer_without_an_end_token_is_refused(tokenizer: Any) -> None:
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end token"):
        load_data([{"prompt": "a", "completion": "b"}], tokenizer)


def test_an_end_that_is_never_supervised_is_refused(tokenizer: Any) -> None:
    audit = load_data([{"text": "abcdefghij"}], tokenizer, max_tokens=5).audit
    audit.require_trainable(ends_expected=False)
    with pytest.raises(DataError, match="never learn to stop"):
        audit.require_trainable(ends_expected=True)


def test_split_keeps_rows_of_one_prompt_together(tokenizer: Any) -> None:
    rows = [{"prompt": f"p{at % 7}", "completion": f"c{at}"} for at in range(40)]
    data = load_data(rows, tokenizer)
    kept, held = data.split(0.25, seed=3)
    again = data.split(0.25, seed=3)
    assert (kept.digest, held.digest) == (again[0].digest, again[1].digest)
    assert held.digest != data.split(0.25, seed=4)[1].digest
    assert len(kept) + len(held) == 40
    assert len(held) >= 10

    def prompts(part: Data) -> set[tuple[int, ...]]:
        return {tuple(prompt) for prompt in part.prompts()}

    assert not prompts(kept) & prompts(held)
    with pytest.raises(TrainError, match="no row is left"):
        load_data(rows[:1] * 4, tokenizer).split(0.5, seed=0)


def test_the_digest_follows_order_ids_masks_and_labels(tokenizer: Any) -> None:
    rows = [{"prompt": "ab", "completion": "c"}, {"prompt": "d", "completion": "e"}]
    digests = {
        load_data(rows, tokenizer).digest,
        load_data(rows[::-1], tokenizer).digest,
        load_data([{"prompt": "a", "completion": "bc"}, rows[1]], tokenizer).digest,
        load_data([{"text": "abc"}, {"text": "de"}], tokenizer).digest,
        load_data([{"text": "abc", "label": 0}, {"text": "de", "label": 1}], tokenizer).digest,
    }
    assert len(digests) == 5
    assert load_data(rows, tokenizer).digest in digests


@pytest.mark.shared
def test_e2e_and_sst2(shared: Path, real: tuple[Any, Any]) -> None:
    columns = {"prompt": "mr", "completion": "ref"}
    data = load_data(
        shared / "data/e2e/devset.csv", real[1], columns=columns, limit=50, max_tokens=300
    )
    first = data.examples[0]
    assert first.ids_T[first.supervised_T][-1] == real[1].eos_token_id
    assert data.tokenizer.decode(data.prompts()[0]).endswith("familyFriendly[no]")
    assert data.audit.end_token_share == 1.0
    columns = {"text": "sentence"}
    data = load_data(shared / "data/glue/SST-2/dev.tsv", real[1], columns=columns)
    assert (len(data), data.labels) == (872, ("0", "1"))
    assert sum(example.label == 1 for example in data.examples) == 444
    assert np.all(data.examples[0].ids_T[:1] == real[1].bos_token_id)


def test_a_label_of_spaces_is_a_fault(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="row 1"):
        load_data([{"text": "a", "label": "  "}, {"text": "b", "label": "c"}], tokenizer)


def test_a_text_without_a_token_is_dropped_and_counted() -> None:
    bare = byte_tokenizer()
    bare._tokenizer.post_processor = None
    data = load_data([{"text": "", "label": "x"}, {"text": "b", "label": "y"}], bare)
    assert (len(data), data.audit.empty, data.audit.longest) == (1, 1, 1)
    assert data.labels == ("x", "y")
