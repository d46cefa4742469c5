"""ShareGPT's and Alpaca's forms of instruction data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sidepath.data.dataset import load_data
from sidepath.data.forms import normal_fields
from sidepath.errors import DataError
from tests.training.kit import supervised_text, whole_text

TALK = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_sharegpt_becomes_messages() -> None:
    turns = [
        ("human", "hi"),
        ("function_call", '{"name": "f", "arguments": {"a": 1}}'),
        ("observation", "2"),
        ("gpt", "two"),
    ]
    fields = {
        "conversations": [{"from": who, "value": value} for who, value in turns],
        "tools": '[{"name": "f", "parameters": {}}]',
        "system": "be",
    }
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert normal_fields(fields, chat=True) == {
        "messages": [
            {"role": "system", "content": "be"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "two"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    }


def test_several_calls_in_one_turn() -> None:
    value = '[{"name": "f", "arguments": {}}, {"name": "g"}]'
    fields = {"conversations": [{"from": "function_call", "value": value}]}
    calls = normal_fields(fields, chat=True)["messages"][0]["tool_calls"]
    assert [call["function"]["name"] for call in calls] == ["f", "g"]


def test_alpaca_with_a_chat_template_becomes_messages(tokenizer: Any) -> None:
    tokenizer.chat_template = TALK
    row = {
        "instruction": "add",
        "input": "1 2",
        "output": "3",
        "system": "be",
        "history": [["q", "a"]],
    }
    data = load_data([row], tokenizer)
    assert whole_text(data) == (
        "[system]be</s>[user]q</s>[assistant]a</s>[user]add\n1 2</s>[assistant]3</s>"
    )
    assert supervised_text(data) == "a</s>3</s>"


def test_alpaca_without_a_template_has_its_own_prompt(tokenizer: Any) -> None:
    rows = [
        {"instruction": "add", "input": "1 2", "output": "3"},
        {"instruction": "hi", "input": "", "output": "yo"},
    ]
    data = load_data(rows, tokenizer)
    assert data.schema == "completion"
    assert [supervised_text(data, row) for row in (0, 1)] == ["3</s>", "yo</s>"]
    assert whole_text(data, 0) == (
        "<s>Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nadd\n\n### Input:\n1 2\n\n### Response:\n3</s>"
    )
    assert whole_text(data, 1) == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nhi\n\n### Response:\nyo</s>"
    )


def test_columns_reach_the_forms(tokenizer: Any) -> None:
    columns = {"instruction": "q", "output": "a"}
    assert len(load_data([{"q": "x", "a": "y"}], tokenizer, columns=columns)) == 1


def test_prompt_and_completion_are_taken_as_they_are() -> None:
    fields = {"prompt": "p", "completion": "c", "instruction": "i", "output": "o"}
    assert normal_fields(fields, chat=True) is fields
    labelled = {"text": "t", "label": 1, "instruction": "i", "output": "o"}
    assert normal_fields(labelled, chat=True) is labelled


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"conversations": "x"}, "expected a list of turns"),
        ({"conversations": [{"value": "x"}]}, 'turn 1 has no "from" and "value"'),
        ({"conversations": [{"from": "elf", "value": "x"}]}, "turn 1 is from 'elf'"),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, "turn 1 is from"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "turn 1: not JSON"),
        ({"conversations": [{"from": "function_call", "value": "3"}]}, "call without"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, "expected text, found int"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "starts with an answer"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "no message of the assistant"),
        ({"instruction": 3, "output": "x"}, '"instruction": expected text, found int'),
        ({"instruction": "x", "output": "y", "history": "z"}, '"history": expected a list'),
        ({"instruction": "x", "output": "y", "history": [["z"]]}, '"history": expected a list'),
    ],
)
def test_broken_forms_name_the_row(tokenizer: Any, fields: dict[str, Any], says: str) -> None:
    tokenizer.chat_template = TALK
    turns = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]
    good = {"conversations": turns}
    with pytest.raises(DataError) as caught:
        load_data([good, fields], tokenizer)
    assert len(caught.value.faults) == 1
    assert caught.value.faults[0].startswith("row 2: ")
    assert says in caught.value.faults[0]


def test_history_needs_a_template(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="need a tokenizer with a chat template"):
        load_data([{"instruction": "x", "output": "y", "system": "z"}], tokenizer)


@pytest.mark.shared
def test_identity(shared: Path, tokenizer: Any) -> None:
    path = shared / "data/instruct/identity.json"
    bare = load_data(path, tokenizer)
    tokenizer.chat_template = TALK
    chat = load_data(path, tokenizer)
    assert len(bare) == len(chat) > 80
    for row in range(len(chat)):
        assert supervised_text(bare, row) == supervised_text(chat, row)
