"""Request and response models of OpenAI's API and of our own stream."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import openai.types
from openai.types import CompletionChoice, CompletionUsage
from pydantic import BaseModel, ConfigDict, Field, model_validator

# Request models: the part of OpenAI's API that is served. Anything else is refused by name.

MOST_CHOICES = 16
MOST_LIKELY = 20  # alternatives of a token, as OpenAI has it

# Fields of OpenAI's API that clients send by habit, with the values that have no effect.
ANYTHING: Any = object()
ASKS_NOTHING: dict[str, Any] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "parallel_tool_calls": ANYTHING,
    "user": ANYTHING,
    "metadata": ANYTHING,
    "safety_identifier": ANYTHING,
    "prompt_cache_key": ANYTHING,
}

Text = Annotated[str, Field(min_length=1)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]

Item = TypeVar("Item")
# A megabyte of bad items would have as many errors, of which only one is reported.
Several = Annotated[list[Item], Field(fail_fast=True)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Several[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Sampling(Strict):
    """Settings of an answer. Without a temperature it is 1, as OpenAI has it; 0 is greedy. The same seed gives the
    same answer; choice k of n is drawn with a seed of its own."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None

    @model_validator(mode="before")
    @classmethod
    def leave_out(cls, data: Any) -> Any:
        """Drops what is null, or asks for nothing; refuses OpenAI's fields that are not served."""
        if not isinstance(data, dict):
            return data
        kept = {name: value for name, value in data.items() if value is not None}
        for name in kept.keys() & ASKS_NOTHING.keys():
            value, nothing = kept.pop(name), ASKS_NOTHING[name]
            if nothing is not ANYTHING and not any(value == each for each in nothing):
                raise ValueError(f"{name} is not supported; leave it out")
        return kept

    @model_validator(mode="after")
    def check_temperature(self) -> Sampling:
        if self.temperature and self.temperature < 0.001:
            raise ValueError("temperature is too near 0; give 0 for the likeliest tokens, or at least 0.001")
        return self


class Streamed(Sampling):
    """Fields that chat and text completion requests share."""

    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    stop: StopText | Annotated[Several[StopText], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @model_validator(mode="after")
    def check_options(self) -> Streamed:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for streams; give stream as well")
        return self


class ChatRequest(Streamed):
    messages: Annotated[Several[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY)] | None = None

    @model_validator(mode="after")
    def check_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs; set it to true as well")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Streamed):
    prompt: Text | Annotated[Several[Text] | Several[int] | Several[Several[int]], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    return_token_ids: bool = False

    @model_validator(mode="after")
    def check_ids(self) -> CompletionRequest:
        if self.return_token_ids and self.stream:
            raise ValueError("return_token_ids is for whole answers; leave out stream")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or several, as texts or as token ids."""
        given: Any = self.prompt
        if isinstance(given, str) or isinstance(given[0], int):
            return [given]
        return given


class TraceRequest(Sampling):
    """For `/v1/ctc/stream`. plain: decode without the drafter."""

    messages: Annotated[Several[Message], Field(min_length=1)]
    plain: bool = False


# Answers in OpenAI's shapes: the types of its client, and what they lack. What is not set is left out.

FinishReason = Literal["stop", "length"]


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    error: ErrorBody


class ChoiceWithTokens(CompletionChoice):
    """finish_reason: None in all pieces of a stream but the last, which OpenAI's own type leaves out. token_ids: all
    that were written, the end token too, where the request asks for them; vLLM's name."""

    finish_reason: FinishReason | None  # type: ignore[assignment]
    token_ids: list[int] | None = None


class CompletionReply(openai.types.Completion):
    """A whole answer, or a piece of a stream."""

    choices: list[ChoiceWithTokens]  # type: ignore[assignment]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[openai.types.Model]


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
    usage: CompletionUsage
    verifications: int
    beta: float
    seconds: float
    prefill_seconds: float
