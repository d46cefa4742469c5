"""Chat templates as models have them: what is rendered, what is supervised, what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sidepath.data.dataset import load_data
from sidepath.errors import DataError
from tests.data.templates import (
    CHATML,
    FORGETFUL,
    LLAMA3,
    MARKED,
    MISTRAL,
    SPECIAL,
    TOOLS,
)
from tests.training.kit import supervised_text, whole_text

TALK = [
    {"role": "system", "content": "be"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so long"},
]
WEATHER = {"name": "weather", "parameters": {"type": "object"}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"at": "Rome"}}}
CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "rain?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [CALL],
    },
    {"role": "tool", "content": "dry"},
    {"role": "assistant", "content": "No."},
]


@pytest.fixture
def chatty(tokenizer: Any) -> Any:
    """The byte tokenizer with the special tokens of the templates; <|im_end|> ends a text."""
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


@pytest.mark.parametrize(
    ("template", "whole", "supervised"),
    [
        (
            CHATML,
            "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
            "<|im_start|>assistant\nyo<|im_end|>\n<|im_start|>user\nbye<|im_end|>\n"
            "<|im_start|>assistant\nso long<|im_end|>\n",
            "yo<|im_end|>\nso long<|im_end|>\n",
        ),
        (
            LLAMA3,
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nbe<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nyo<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nbye<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nso long<|eot_id|>",
            "yo<|eot_id|>so long<|eot_id|>",
        ),
        (
            MISTRAL,
            "<s>[INST] be\n\nhi [/INST] yo</s>[INST] bye [/INST] so long</s>",
            " yo</s> so long</s>",
        ),
        (
            MARKED,
            "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
            "<|im_start|>assistant\nyo<|im_end|>\n<|im_start|>user\nbye<|im_end|>\n"
            "<|im_start|>assistant\nso long<|im_end|>\n",
            "yo<|im_end|>so long<|im_end|>",
        ),
    ],
)
def test_answers_and_their_end_tokens_are_supervised(
    chatty: Any, template: str, whole: str, supervised: str
) -> None:
    chatty.chat_template = template
    if template == MISTRAL:
        chatty.eos_token = "</s>"
    data = load_data([{"messages": TALK}], chatty)
    assert whole_text(data) == whole
    assert supervised_text(data) == supervised
    audit = data.audit
    assert audit.end_token_share == 1.0
    audit.require_trainable(ends_expected=True)
    assert whole.startswith(chatty.decode(data.prompts()[0]))
    assert data.examples[0].reference == "so long"


def test_tool_calls_are_answers_too(chatty: Any) -> None:
    chatty.chat_template = TOOLS
    data = load_data([{"messages": CALLED, "tools": [WEATHER]}], chatty)
    tool = json.dumps({"type": "function", "function": WEATHER})
    assert whole_text(data).startswith(f"<|im_start|>system\nTools:\n{tool}<|im_end|>\n")
    assert "<tool_response>dry</tool_response>" in whole_text(data)
    assert supervised_text(data) == (
        '<tool_call>{"name": "weather", "arguments": {"at": "Rome"}}</tool_call><|im_end|>\n'
        "No.<|im_end|>\n"
    )
    last = load_data([{"messages": CALLED[:2]}], chatty).examples[0]
    assert last.reference == '[{"name": "weather", "arguments": {"at": "Rome"}}]'
    assert "Tools:" not in chatty.decode(last.ids_T)


@pytest.mark.parametrize(
    "call",
    [
        {"name": "weather", "arguments": {"at": "Rome"}},
        {"name": "weather", "arguments": '{"at": "Rome"}'},
        {"function": {"name": "weather", "arguments": '{"at": "Rome"}'}},
        {
            "id": "c1",
            "type": "function",
            "function": {"name": "weather", "arguments": {"at": "Rome"}},
        },
    ],
)
def test_the_usual_forms_of_a_tool_call_are_one(chatty: Any, call: dict[str, Any]) -> None:
    chatty.chat_template = TOOLS
    turns = [CALLED[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    data = load_data([{"messages": turns}], chatty)
    expected = load_data([{"messages": CALLED[:2]}], chatty)
    assert np.array_equal(data.examples[0].ids_T, expected.examples[0].ids_T)


def test_a_tokenizer_may_have_a_template_for_tools_apart(chatty: Any) -> None:
    chatty.chat_template = {"default": MARKED, "tool_use": TOOLS}
    rows: list[dict[str, Any]] = [{"messages": TALK}, {"messages": CALLED, "tools": [WEATHER]}]
    data = load_data(rows, chatty)
    assert supervised_text(data, 0) == "yo<|im_end|>so long<|im_end|>"
    assert supervised_text(data, 1).endswith("</tool_call><|im_end|>\nNo.<|im_end|>\n")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}{{ m.role }}", "not valid Jinja, line 1"),
        ("\n\n{{ oh no }}", "not valid Jinja, line 3"),
        ("{{ raise_exception('not for us') }}", "refuses the conversation: not for us"),
        ("{{ messages[9].content }}", "refuses the conversation: .*has no element 9"),
        ("{{ messages[0].content + 1 }}", "refuses the conversation: TypeError"),
        ("{{ 1 // 0 }}", "refuses the conversation: ZeroDivisionError"),
        ("{{ messages.pop() }}", "refuses the conversation: .*unsafe|is not safely callable"),
        ("{% include 'x' %}", "refuses the conversation: TypeError: no loader"),
        (FORGETFUL, "message 3: the chat template renders the conversation up to here in another"),
    ],
)
def test_a_template_that_fails_names_the_row_and_the_reason(
    chatty: Any, template: str, says: str
) -> None:
    chatty.chat_template = template
    talk = [dict(turn) for turn in TALK]
    talk[2]["content"] = "hm</think>yo"
    with pytest.raises(DataError) as caught:
        load_data([{"messages": talk}, {"messages": talk}], chatty)
    assert len(caught.value.faults) == 2
    for number, fault in enumerate(caught.value.faults, start=1):
        assert fault.startswith(f"row {number}: ")
        assert re.search(says, fault), fault


def test_roles_that_do_not_alternate(chatty: Any) -> None:
    chatty.chat_template = MISTRAL
    with pytest.raises(DataError, match=r"row 2: .*roles must alternate"):
        load_data([{"messages": TALK}, {"messages": TALK[2:]}], chatty)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"messages": [{**CALLED[1], "tool_calls": [{"id": "x"}]}]}, 'a tool call without "name"'),
        ({"messages": [{**CALLED[1], "tool_calls": "x"}]}, '"tool_calls": expected a list'),
        (
            {"messages": [{**CALLED[1], "tool_calls": [{"name": "x", "arguments": "{"}]}]},
            '"arguments": not JSON',
        ),
        (
            {"messages": [{**CALLED[1], "tool_calls": [{"name": "x", "arguments": [1]}]}]},
            "are no object",
        ),
        ({"messages": [{"role": "assistant", "content": None}]}, "expected text, found NoneType"),
        ({"messages": CALLED, "tools": "{"}, '"tools": not JSON'),
        ({"messages": CALLED, "tools": {"a": 1}}, '"tools": expected a list'),
        ({"messages": CALLED, "tools": [{}]}, 'tool 1 has no "name"'),
    ],
)
def test_malformed_tools(chatty: Any, fields: dict[str, Any], says: str) -> None:
    chatty.chat_template = TOOLS
    with pytest.raises(DataError, match=r"the data have faults") as caught:
        load_data([fields, {"messages": CALLED}], chatty)
    assert len(caught.value.faults) == 1
    assert caught.value.faults[0].startswith("row 1: ")
    assert says in caught.value.faults[0]


@pytest.mark.shared
def test_glaive_tool_calls(shared: Path, chatty: Any) -> None:
    """300 conversations in ShareGPT's form: every answer and every call is supervised."""
    path = shared / "data/instruct/glaive_toolcall_en_demo.json"
    chatty.chat_template = TOOLS
    chatty.model_max_length = 100_000
    data = load_data(path, chatty, max_tokens=100_000)
    rows = json.loads(path.read_text())
    assert (len(data), data.schema, data.dropped.empty) == (300, "messages", 0)
    assert data.audit.end_token_share == 1.0
    for at in range(300):
        turns = rows[at]["conversations"]
        answers = [turn for turn in turns if turn["from"] in ("gpt", "function_call")]
        found = supervised_text(data, at).split("<|im_end|>\n")[:-1]
        assert len(found) == len(answers)
        for text, turn in zip(found, answers, strict=True):
            if turn["from"] == "gpt":
                assert text == turn["value"]
            else:
                inner = text.removeprefix("<tool_call>").removesuffix("</tool_call>")
                assert json.loads(inner) == json.loads(turn["value"])
        tools = json.loads(rows[at]["tools"]) if rows[at]["tools"] else []
        assert all(tool["name"] in whole_text(data, at) for tool in tools)
