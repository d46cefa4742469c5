"""Other people's forms of chat data, made into `messages` at the edge.

ShareGPT: `conversations` of turns {from, value}, with `tools` (a JSON text or a list) and
`system` beside it. Alpaca: `instruction`, `input`, `output`, and `system`, `history`.
In `messages` themselves, tool calls are brought to one form, whichever of the usual ones they
have: {"type": "function", "function": {"name": ..., "arguments": {...}}}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sidepath.data.sources import Row, Source
from sidepath.errors import DataError

Form = Literal["sharegpt", "alpaca"]
FORMS: dict[Form, tuple[str, ...]] = {
    "sharegpt": ("conversations", "tools", "system"),
    "alpaca": ("instruction", "output", "input", "system", "history"),
}
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
"""ShareGPT's `from` -> the role of a message."""
ALPACA = (
    "Below is an instruction that describes a task{also}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
"""The prompt of Taori et al., "Stanford Alpaca" (2023), for tokenizers without a chat template."""
_ALSO = ", paired with an input that provides further context"


def normalised(source: Source, rows: Sequence[Row], *, chat: bool) -> list[Row]:
    """The rows with their conversations as `messages` (and `tools` as a list).

    With `chat` (the tokenizer has a chat template) Alpaca rows become messages, else prompt
    and completion with Alpaca's own prompt. Rows whose form is broken become faults.
    """
    return [made for row in rows if (made := _normal(source, row, chat)) is not None]


def _normal(source: Source, row: Row, chat: bool) -> Row | None:
    try:
        fields = normal_fields(row.fields, chat=chat)
    except DataError as error:
        source.fault(row.line, error.what)
        return None
    return row if fields is row.fields else Row(row.line, fields)


def normal_fields(fields: Mapping[str, Any], *, chat: bool) -> Mapping[str, Any]:
    """One row's fields in our form; a `DataError` says what is wrong with them."""
    if "messages" in fields:
        messages = fields["messages"]
        if isinstance(messages, list) and _plain(messages) and not fields.get("tools"):
            return fields
        return {**fields, "messages": _messages(messages), "tools": _tools(fields.get("tools"))}
    if "conversations" in fields:
        messages = [*_system(fields), *_turns(fields["conversations"])]
        return {"messages": _messages(messages), "tools": _tools(fields.get("tools"))}
    asked = "instruction" in fields and "output" in fields
    if asked and "completion" not in fields and "label" not in fields:
        return _alpaca(fields, chat)
    return fields


def _plain(messages: Sequence[Any]) -> bool:
    """Nothing in the messages but role and content."""
    return all(isinstance(one, Mapping) and one.keys() <= {"role", "content"} for one in messages)


def _system(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "system", "content": fields["system"]}] if fields.get("system") else []


def _turns(turns: Any) -> list[dict[str, Any]]:
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise DataError(f'"conversations": expected a list of turns, found {turns!r:.40}')
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
            raise DataError(f'"conversations": turn {number} has no "from" and "value"')
        who, value = turn["from"], turn["value"]
        if not isinstance(who, str) or who not in ROLES:
            raise DataError(
                f'"conversations": turn {number} is from {who!r}, expected {", ".join(ROLES)}'
            )
        if who == "function_call":
            calls = _called(value, f'"conversations": turn {number}')
            messages.append({"role": "assistant", "content": None, "tool_calls": calls})
        else:
            messages.append({"role": ROLES[who], "content": value})
    return messages


def _called(value: Any, where: str) -> list[Any]:
    calls = _json(value, where)
    return calls if isinstance(calls, list) else [calls]


def _json(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(f"{where}: not JSON: {value[:40]}") from None


def _messages(messages: Any) -> Any:
    """Messages with tool calls in one form; what is no message is left for the row check."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return messages
    return [_message(at, one) for at, one in enumerate(messages, start=1)]


def _message(number: int, message: Any) -> Any:
    if not isinstance(message, Mapping):
        return message
    # Tables (Parquet, Arrow) give every message every key, with None where it has none.
    kept = {key: value for key, value in message.items() if value is not None or key == "content"}
    if "tool_calls" in kept:
        calls = kept["tool_calls"]
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise DataError(f'message {number}, "tool_calls": expected a list')
        kept["tool_calls"] = [_call(call, f"message {number}") for call in calls]
        if not calls:
            del kept["tool_calls"]
    return kept


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f'{where}: a tool call without "name"')
    arguments = _json(function.get("arguments") or {}, f'{where}, "arguments"')
    if not isinstance(arguments, Mapping):
        raise DataError(f'{where}: "arguments" of a tool call are no object')
    inner = {"name": function["name"], "arguments": dict(arguments)}
    known = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**known, "type": "function", "function": inner}


def _tools(tools: Any) -> list[Any] | None:
    """The tools of a row as a list of {"type": "function", "function": {...}}; None for none."""
    if tools is None or tools == "":
        return None
    found = _json(tools, '"tools"')
    if not isinstance(found, list):
        raise DataError(f'"tools": expected a list, found {type(found).__name__}')
    made = []
    for number, tool in enumerate(found, start=1):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f'"tools": tool {number} has no "name"')
        made.append({"type": "function", "function": dict(function)})
    return made or None


def _alpaca(fields: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    texts = {name: fields.get(name) or "" for name in ("instruction", "input", "output", "system")}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise DataError(f'"{name}": expected text, found {type(value).__name__}')
    history = fields.get("history") or []
    if chat:
        query = texts["instruction"] + (f"\n{texts['input']}" if texts["input"] else "")
        return {"messages": [*_system(fields), *_asked(history), *_pair([query, texts["output"]])]}
    if history or texts["system"]:
        raise DataError('"system" and "history" need a tokenizer with a chat template')
    given = f"### Input:\n{texts['input']}\n\n" if texts["input"] else ""
    prompt = ALPACA.format(
        also=_ALSO if given else "", instruction=texts["instruction"], input=given
    )
    return {"prompt": prompt, "completion": texts["output"]}


def _asked(history: Any) -> list[dict[str, Any]]:
    pairs = history if isinstance(history, Sequence) and not isinstance(history, str) else [None]
    messages = []
    for pair in pairs:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise DataError('"history": expected a list of [question, answer]')
        messages += _pair(pair)
    return messages


def _pair(pair: Sequence[Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
