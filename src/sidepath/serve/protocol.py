"""Bodies as OpenAI's clients write them (floor 5).

A field that would change the answer and is not known, or that cannot be followed, is an error:
nothing is ignored in silence. Fields of other servers that people use (top_k, min_p,
repetition_penalty) are taken too.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sidepath.errors import RequestRefused, closest
from sidepath.kernels.hashed import seed_of
from sidepath.serve.forms import Form, asked_form
from sidepath.serve.requests import Request
from sidepath.serve.sampling import Sampling

MOST_ANSWERS = 16
"""Answers that one body may ask for: n times the number of prompts."""
DEFAULT_TOKENS = 128
"""Longest answer where the body says nothing."""


def _is(kind: type | tuple[type, ...]) -> Callable[[Any], bool]:
    """Whether a value is of a kind; true and false are no numbers."""
    return lambda value: isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _strings(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(each, str) for each in value)
    )


_NUMBER = (_is((int, float)), "a number")
_WHOLE = (_is(int), "a whole number")
_SETTINGS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "model": (_is(str), "a string"),
    "max_tokens": _WHOLE,
    "max_completion_tokens": _WHOLE,
    "temperature": _NUMBER,
    "top_p": _NUMBER,
    "top_k": _WHOLE,
    "min_p": _NUMBER,
    "repetition_penalty": _NUMBER,
    "seed": _WHOLE,
    "stop": (_strings, "a string or a list of strings"),
    "stream": (_is(bool), "true or false"),
    "stream_options": (_is(dict), "an object"),
    "n": _WHOLE,
    "user": (_is(str), "a string"),
    "response_format": (_is(dict), "an object"),
}
_COMPLETION = {"prompt": (lambda value: True, ""), "logprobs": _WHOLE}
_CHAT = {
    "messages": (_is(list), "a list"),
    "logprobs": (_is(bool), "true or false"),
    "top_logprobs": _WHOLE,
}
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "tools": ([],),
    "metadata": ({},),
    "store": (False,),
}
"""Fields that are known and not followed, with the value that asks for nothing."""


@dataclass(frozen=True)
class Asked:
    """A body that was understood."""

    chat: bool
    model: str
    requests: tuple[Request, ...]
    """One an answer; the adapter is not filled in yet."""
    stream: bool
    usage: bool
    """Whether the stream ends with the number of tokens."""
    prompt_tokens: int
    """Tokens of all prompts; answers to one prompt share it."""
    each: int
    """Answers to each prompt, which follow one another."""


def parse(
    raw: bytes,
    chat: bool,
    tokenizer: Any,
    check_text: Callable[[Mapping[str, Any]], None] = lambda body: None,
) -> Asked:
    """What a body asks for; `check_text` may refuse it before tokens are made of its texts.

    Errors: one `RequestRefused` that names every field at fault.
    """
    body = body_of(raw)
    body = {name: value for name, value in body.items() if value is not None}
    faults = _faults(body, {**_SETTINGS, **(_CHAT if chat else _COMPLETION)})
    needed = "messages" if chat else "prompt"
    faults += [f"{name} is missing" for name in ("model", needed) if name not in body]
    if faults:
        raise RequestRefused("the body cannot be followed", faults=faults)
    check_text(body)
    prompts = [_chat_prompt(body, tokenizer)] if chat else _prompts(body["prompt"], tokenizer)
    count = body.get("n", 1)
    _refuse_many(len(prompts), count)
    form = asked_form(body.get("response_format", {"type": "text"}), tokenizer)
    seed = body.get("seed", secrets.randbits(63))
    requests = tuple(
        _request(body, chat, prompt, seed if number == 0 else seed_of(seed, number), form)
        for number, prompt in enumerate(prompt for prompt in prompts for _ in range(count))
    )
    usage = body.get("stream_options", {}).get("include_usage") is True
    tokens = sum(map(len, prompts))
    return Asked(chat, body["model"], requests, body.get("stream", False), usage, tokens, count)


def _refuse_many(prompts: int, count: int) -> None:
    if not 1 <= count * prompts <= MOST_ANSWERS:
        raise RequestRefused(
            "the body asks for too many answers, or for none",
            found=f"n = {count} for {prompts} prompts",
            expected=f"1 to {MOST_ANSWERS} in all",
        )


def body_of(raw: bytes) -> dict[str, Any]:
    """The object that a body is. Errors: `RequestRefused`."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise RequestRefused("the body is not JSON", found=str(error)[:200]) from error
    if not isinstance(body, dict):
        raise RequestRefused("the body is not a JSON object", found=type(body).__name__)
    return body


def _faults(
    body: Mapping[str, Any], known: Mapping[str, tuple[Callable[[Any], bool], str]]
) -> list[str]:
    faults = []
    for name, value in body.items():
        if name in known:
            holds, must = known[name]
            if not holds(value):
                faults.append(f"{name} must be {must}")
        elif name in _NEUTRAL:
            if value not in _NEUTRAL[name]:
                faults.append(f"{name} is not supported")
        else:
            near = closest(name, known, 1) if len(faults) < 20 else []
            hint = f": did you mean {near[0]}?" if near else ""
            faults.append(f"{name[:100]} is not known{hint}")
    return faults


def _request(
    body: Mapping[str, Any], chat: bool, prompt: tuple[int, ...], seed: int, form: Form | None
) -> Request:
    stop = body.get("stop", [])
    logprobs = body.get("logprobs")
    if chat:
        logprobs = body.get("top_logprobs", 0) if logprobs else None
    return Request(
        prompt=prompt,
        max_new_tokens=body.get("max_completion_tokens", body.get("max_tokens", DEFAULT_TOKENS)),
        sampling=Sampling(
            temperature=body.get("temperature", 1.0),
            top_k=body.get("top_k", 0),
            top_p=body.get("top_p", 1.0),
            min_p=body.get("min_p", 0.0),
            repetition_penalty=body.get("repetition_penalty", 1.0),
            seed=seed,
            logprobs=logprobs,
        ),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        form=form,
    )


def _prompts(given: Any, tokenizer: Any) -> list[tuple[int, ...]]:
    """A prompt may be a string, tokens, or a list of either."""
    several = _several(given)
    _refuse_many(len(several), 1)
    if not all(isinstance(each, str) or _tokens(each) for each in several):
        raise RequestRefused(
            "prompt cannot be read", expected="a string, a list of tokens, or a list of either"
        )
    return [
        tuple(tokenizer(each)["input_ids"]) if isinstance(each, str) else tuple(each)
        for each in several
    ]


def _several(given: Any) -> list[Any]:
    return given if isinstance(given, list) and not _tokens(given) else [given]


def answers_of(body: Mapping[str, Any]) -> int:
    """How many answers a body asks for that can be followed; 1 of any other."""
    count, prompts = body.get("n", 1), len(_several(body.get("prompt")))
    well = _is(int)(count) and 1 <= count * prompts <= MOST_ANSWERS
    return count * prompts if well else 1


def _tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is(int)(each) for each in value)


def _chat_prompt(body: Mapping[str, Any], tokenizer: Any) -> tuple[int, ...]:
    faults = [
        f"messages[{number}] must have a role and a content, both strings"
        for number, message in enumerate(body["messages"])
        if not isinstance(message, dict)
        or not isinstance(message.get("role"), str)
        or not isinstance(message.get("content"), str)
    ]
    if faults or not body["messages"]:
        raise RequestRefused("messages cannot be read", faults=faults or ["there are none"])
    if not tokenizer.chat_template:
        raise RequestRefused(
            "the base has no chat template", hint="ask /v1/completions, with the prompt as it is"
        )
    try:
        ids = tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
    # A template is a program of its author's: it may fail in any way a program can.
    except Exception as error:
        raise RequestRefused(
            "the chat template refuses the messages", found=f"{type(error).__name__}: {error}"
        ) from error
    return tuple(ids)
