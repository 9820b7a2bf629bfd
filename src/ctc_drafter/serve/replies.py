"""Answers in OpenAI's shapes."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length"]


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    error: ErrorBody


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Alternative(BaseModel):
    """bytes: the UTF-8 of the token; None where it is a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Alternative):
    top_logprobs: list[Alternative]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class ChatReply(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionChoice(BaseModel):
    """token_ids: all that were written, the end token too, where the request asks for them; vLLM's name."""

    index: int
    text: str
    token_ids: list[int] | None = None
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None


class CompletionReply(BaseModel):
    """A whole answer, or a piece of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "ctc-drafter"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok", "stopping"]
    running: int
    waiting: int


# Events of /v1/ctc/stream.


class TracePiece(BaseModel):
    token: int
    text: str


class TraceNode(BaseModel):
    """parent: number of the node above; the root, number 0, is its own. probability: the drafter's, of the prefix."""

    token: int
    text: str
    parent: int
    depth: int
    probability: float
    accepted: bool


class TraceStep(BaseModel):
    """One verification. bonus: whether the last piece is the target's own token. The first step is the prefill, whose
    tree is empty."""

    number: int
    seconds: float
    pieces: list[TracePiece]
    accepted: int
    bonus: bool
    tree: list[TraceNode]


class TraceEnd(BaseModel):
    """beta: tokens per verification, the prefill's token not counted. tail: text that was held back."""

    finish_reason: FinishReason
    tail: str
    usage: Usage
    verifications: int
    beta: float
    seconds: float
    prefill_seconds: float
