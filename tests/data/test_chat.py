from __future__ import annotations

from typing import Any

import pytest

from sidepath.data.dataset import load_data
from sidepath.errors import DataError
from tests.training.kit import supervised_text, whole_text

PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% if m.role == 'assistant' %}</s>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role != 'assistant' or loop.last %}"
    "{{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TALK = [
    {"role": "system", "content": "be"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so long"},
]


def test_only_answers_are_supervised_by_prefixes(tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN
    data = load_data([{"messages": TALK}], tokenizer)
    assert supervised_text(data) == "yo</s>\nso long</s>\n"
    assert whole_text(data).startswith("[system]be\n[user]hi\n[assistant]yo</s>")
    assert data.audit.end_token_share == 1.0
    assert data.tokenizer.decode(data.prompts()[0]).endswith("[user]bye\n[assistant]")
    assert data.examples[0].reference == "so long"


def test_the_templates_own_marks_are_used(tokenizer: Any) -> None:
    tokenizer.chat_template = MARKED
    data = load_data([{"messages": TALK}], tokenizer)
    assert supervised_text(data) == "yo</s>so long</s>"
    assert data.tokenizer.decode(data.prompts()[0]).endswith("[assistant]")


def test_a_template_that_rewrites_history_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = FORGETFUL
    assert len(load_data([{"messages": TALK[:3]}], tokenizer)) == 1
    with pytest.raises(DataError, match=r"row 2: message 3: the chat template renders"):
        load_data([{"messages": TALK[:3]}, {"messages": TALK}], tokenizer)


def test_long_conversations_lose_their_beginning(tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN
    data = load_data([{"messages": TALK}], tokenizer, max_tokens=30)
    assert len(data.examples[0].ids_T) == 30
    assert supervised_text(data).endswith("so long</s>\n")
    assert data.audit.truncated == 1
    with pytest.raises(DataError, match="1 over-long"):
        load_data([{"messages": TALK}], tokenizer, max_tokens=8)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("hi", "expected a list"),
        ([], "expected a list"),
        ([{"content": "x"}], 'message 1 has no "role"'),
        ([{"role": "user", "content": None}], "expected text"),
        ([{"role": "user", "content": "x"}], "no message of the assistant"),
    ],
)
def test_malformed_conversations(tokenizer: Any, messages: Any, says: str) -> None:
    tokenizer.chat_template = PLAIN
    with pytest.raises(DataError, match=says):
        load_data([{"messages": messages}], tokenizer)


def test_a_template_that_raises_names_the_row(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"row 1: the chat template refuses .*must alternate"):
        load_data([{"messages": TALK}], tokenizer)


def test_no_template(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no chat template"):
        load_data([{"messages": TALK}], tokenizer)


def test_a_template_without_an_end_token_fails_the_audit(tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN.replace("</s>", "")
    data = load_data([{"messages": TALK}], tokenizer)
    assert data.audit.end_token_share == 0.0
    with pytest.raises(DataError, match="never learn to stop"):
        data.audit.require_trainable(ends_expected=True)
