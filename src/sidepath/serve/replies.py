"""What OpenAI's clients expect back, whole or piece by piece (floor 5)."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from sidepath.serve.protocol import Asked
from sidepath.serve.requests import Handle, Piece
from sidepath.serve.sampling import Chosen


class Reply:
    """Builds the documents of one reply. `handles` are those of its answers, in order; each choice
    carries the generation of the adapter that gives it, as `/v1/models` counts them.
    """

    def __init__(self, asked: Asked, tokenizer: Any, handles: Sequence[Handle]) -> None:
        self._asked, self._tokenizer, self._handles = asked, tokenizer, handles
        kind = "chatcmpl" if asked.chat else "cmpl"
        self.head = {
            "id": f"{kind}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": asked.model,
        }
        self._answers = [0] * len(asked.requests)
        self._fresh = [True] * len(asked.requests)

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """A piece of one answer as the stream carries it."""
        self._answers[index] += piece.chosen is not None
        choice = self._choice(index, piece)
        chosen = [] if piece.chosen is None else [piece.chosen]
        choice["logprobs"] = self._logprobs(index, chosen) if chosen else None
        if self._asked.chat:
            first = {"role": "assistant"} if self._fresh[index] else {}
            choice["delta"] = first | ({"content": piece.text} if piece.text or first else {})
        else:
            choice["text"] = piece.text
        self._fresh[index] = False
        return self._document([choice], "chat.completion.chunk")

    def whole(self, answers: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        """All answers in one document."""
        choices = []
        for index, pieces in enumerate(answers):
            chosen = [piece.chosen for piece in pieces if piece.chosen is not None]
            self._answers[index] = len(chosen)
            text = "".join(piece.text for piece in pieces)
            choice = self._choice(index, pieces[-1])
            choice["logprobs"] = self._logprobs(index, chosen)
            if self._asked.chat:
                choice["message"] = {"role": "assistant", "content": text}
            else:
                choice["text"] = text
            choices.append(choice)
        return self._document(choices, "chat.completion") | {"usage": self._usage()}

    def last(self) -> dict[str, Any]:
        """The document that ends a stream whose tokens were to be counted."""
        return self._document([], "chat.completion.chunk") | {"usage": self._usage()}

    def _choice(self, index: int, last: Piece) -> dict[str, Any]:
        generation = self._handles[index].generation
        return {"index": index, "finish_reason": last.finish, "generation": generation}

    def _document(self, choices: list[dict[str, Any]], chat_object: str) -> dict[str, Any]:
        kind = chat_object if self._asked.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices}

    def _usage(self) -> dict[str, Any]:
        prompt, answer = self._asked.prompt_tokens, sum(self._answers)
        reused = sum(handle.reused for handle in self._handles[:: self._asked.each])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": {"cached_tokens": reused},
        }

    def _logprobs(self, index: int, chosen: Sequence[Chosen]) -> dict[str, Any] | None:
        if self._asked.requests[index].sampling.logprobs is None:
            return None
        if self._asked.chat:
            return {"content": [self._entry(each) for each in chosen]}
        return {
            "tokens": [self._text(each.token) for each in chosen],
            "token_logprobs": [each.logprob for each in chosen],
            "top_logprobs": [
                {self._text(token): logprob for token, logprob in each.likeliest} for each in chosen
            ],
        }

    def _entry(self, chosen: Chosen) -> dict[str, Any]:
        own = ((chosen.token, chosen.logprob), *chosen.likeliest)
        entries = [
            {"token": self._text(token), "logprob": logprob, "bytes": None}
            for token, logprob in own
        ]
        return {**entries[0], "top_logprobs": entries[1:]}

    def _text(self, token: int) -> str:
        text: str = self._tokenizer.decode([token])
        return text
