"""Answers as chat messages and as completions: whole ones, and pieces of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from ctc_drafter.chat import REPLACEMENT
from ctc_drafter.serve.exchange import Answer
from ctc_drafter.serve.jobs import Job, Written
from ctc_drafter.serve.replies import (
    Alternative,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    ChatMessage,
    ChatReply,
    CompletionChoice,
    CompletionLogprobs,
    CompletionReply,
    Delta,
    FinishReason,
    TokenLogprob,
    Usage,
)


class Form(Protocol):
    """How the answers of one request look."""

    def whole(self, answers: Sequence[Answer], usage: Usage) -> BaseModel: ...
    def opening(self, count: int) -> list[BaseModel]: ...
    def piece(self, place: int, text: str, tokens: Sequence[Written], reason: FinishReason | None) -> BaseModel: ...
    def closing(self, usage: Usage) -> BaseModel: ...


@dataclass(frozen=True)
class Wording:
    """Tokens as texts for log-probabilities; `asked` says whether there are any."""

    tokenizer: PreTrainedTokenizerBase
    asked: bool

    def text(self, token: int) -> str:
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))

    def alternative(self, token: int, logprob: float) -> Alternative:
        text = self.text(token)
        return Alternative(token=text, logprob=logprob, bytes=None if REPLACEMENT in text else list(text.encode()))

    def by_text(self, top: Sequence[tuple[int, float]]) -> dict[str, float]:
        """Of tokens with the same text, such as parts of characters, the likeliest stays."""
        return {self.text(token): value for token, value in reversed(top)}

    def chat(self, tokens: Sequence[Written]) -> ChatLogprobs | None:
        if not self.asked:
            return None
        content = []
        for written in tokens:
            assert written.likelihood is not None
            own = self.alternative(written.token, written.likelihood.written)
            top = [self.alternative(*pair) for pair in written.likelihood.top]
            content.append(TokenLogprob(**own.model_dump(), top_logprobs=top))
        return ChatLogprobs(content=content)

    def completion(self, tokens: Sequence[Written]) -> CompletionLogprobs | None:
        if not self.asked:
            return None
        known = [(written, written.likelihood) for written in tokens if written.likelihood is not None]
        return CompletionLogprobs(
            tokens=[self.text(written.token) for written, _ in known],
            token_logprobs=[likelihood.written for _, likelihood in known],
            top_logprobs=[self.by_text(likelihood.top) for _, likelihood in known],
            text_offset=[written.offset for written, _ in known],
        )


@dataclass(frozen=True)
class ChatForm:
    model: str
    wording: Wording
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Answer], usage: Usage) -> ChatReply:
        choices = [
            ChatChoice(
                index=place,
                message=ChatMessage(content=answer.text),
                logprobs=self.wording.chat(answer.tokens),
                finish_reason=answer.finish.reason,
            )
            for place, answer in enumerate(answers)
        ]
        return ChatReply(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    def opening(self, count: int) -> list[BaseModel]:
        start = Delta(role="assistant", content="")
        return [self._chunk([ChatChunkChoice(index=place, delta=start)]) for place in range(count)]

    def piece(self, place: int, text: str, tokens: Sequence[Written], reason: FinishReason | None) -> BaseModel:
        delta = Delta(content=text) if text or reason is None else Delta()
        logprobs = self.wording.chat(tokens)
        return self._chunk([ChatChunkChoice(index=place, delta=delta, logprobs=logprobs, finish_reason=reason)])

    def closing(self, usage: Usage) -> BaseModel:
        return self._chunk([], usage)

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> ChatChunk:
        return ChatChunk(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)


@dataclass(frozen=True)
class CompletionForm:
    """ids: whether token ids are given as well."""

    model: str
    wording: Wording
    ids: bool = False
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Answer], usage: Usage) -> CompletionReply:
        choices = [
            self._choice(place, answer.text, answer.tokens, answer.finish.reason, answer.finish.ids)
            for place, answer in enumerate(answers)
        ]
        return self._reply(choices, usage)

    def opening(self, count: int) -> list[BaseModel]:
        return []

    def piece(self, place: int, text: str, tokens: Sequence[Written], reason: FinishReason | None) -> BaseModel:
        return self._reply([self._choice(place, text, tokens, reason)])

    def closing(self, usage: Usage) -> BaseModel:
        return self._reply([], usage)

    def _choice(
        self,
        place: int,
        text: str,
        tokens: Sequence[Written],
        reason: FinishReason | None,
        ids: Sequence[int] = (),
    ) -> CompletionChoice:
        logprobs, given = self.wording.completion(tokens), list(ids) if self.ids else None
        return CompletionChoice(index=place, text=text, token_ids=given, logprobs=logprobs, finish_reason=reason)

    def _reply(self, choices: list[CompletionChoice], usage: Usage | None = None) -> CompletionReply:
        return CompletionReply(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)


def usage_of(jobs: Sequence[Job], choices: int) -> Usage:
    """Tokens of all jobs; `choices` of them share a prompt, which is counted once."""
    prompt = sum(len(job.prompt) for job in jobs[::choices])
    written = sum(len(job.tokens) for job in jobs)
    return Usage(prompt_tokens=prompt, completion_tokens=written, total_tokens=prompt + written)
