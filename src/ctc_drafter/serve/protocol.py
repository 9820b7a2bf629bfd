"""Request and response models of OpenAI's API and of our own stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import openai.types
from openai.types import CompletionChoice, CompletionUsage
from pydantic import BaseModel, Field, Tag, model_validator

from ctc_drafter.serve.messages import ANYTHING, Message, Several, Strict, Tool, Whole, text_or_list, which
from ctc_drafter.serve.tool_choice import REQUIRED, named_tool

# Request models: the part of OpenAI's API that is served. Anything else is refused by name.

MOST_CHOICES = 16
MOST_LIKELY = 20  # alternatives of a token, as OpenAI has it

# What clients send by habit: values that ask for nothing, in OpenAI's API and in those of vLLM, SGLang and llama.cpp.
SETTINGS_ASK_NOTHING: dict[str, Any] = {
    "max_tokens": (-1,),
    "seed": (-1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "length_penalty": (1,),
    "logit_bias": ({}, []),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "tools": ([],),
    "tool_choice": ("auto",),
    "parallel_tool_calls": (True,),
    "chat_template_kwargs": ({},),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "priority": (0,),
    "prediction": ANYTHING,  # a guess at the answer, which could only make it faster
    "user": ANYTHING,
    "metadata": ANYTHING,
    "safety_identifier": ANYTHING,
    "prompt_cache_key": ANYTHING,
    "prompt_cache_retention": ANYTHING,
    "request_id": ANYTHING,
}
Text = Annotated[str, Field(min_length=1)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]


class JsonSchema(Strict):
    """strict: schemas are followed to the letter with and without."""

    name: str | None = None
    description: str | None = None
    definition: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def check_schema(self) -> ResponseFormat:
        if (self.json_schema is None) != (self.type == "json_object"):
            raise ValueError("json_schema goes with the type of that name; give both or neither")
        return self


class StreamOptions(Strict):
    include_usage: bool | None = None
    asks_nothing: ClassVar[Mapping[str, Any]] = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}


Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenNumber = Annotated[str, Field(pattern="^[0-9]{1,9}$")]


class Sampling(Strict):
    """Settings of an answer. What is not given is as the model's generation config has it, else as OpenAI does: the
    temperature is 1 then. 0 is greedy. The same seed gives the same answer; choice k of n is drawn with a seed of its
    own. top_k: 0 or -1 for all tokens.

    presence_penalty, frequency_penalty: for what the answer holds. repetition_penalty: for what prompt or answer hold.
    logit_bias: by token id. min_tokens: so many come before an end token may. stop_token_ids: end tokens besides the
    model's own, which ignore_eos leaves out.
    """

    model: str | None = None
    max_tokens: Annotated[Whole, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: Annotated[dict[TokenNumber, Bias], Field(max_length=1024, fail_fast=True)] | None = None
    min_tokens: Annotated[Whole, Field(ge=0, le=2**31)] | None = None
    stop_token_ids: Annotated[Several[Whole], Field(max_length=64)] | None = None
    ignore_eos: bool = False
    asks_nothing: ClassVar[Mapping[str, Any]] = SETTINGS_ASK_NOTHING

    @model_validator(mode="after")
    def check_temperature(self) -> Sampling:
        if self.temperature and self.temperature < 0.001:
            raise ValueError("temperature is too near 0; give 0 for the likeliest tokens, or at least 0.001")
        return self


class Streamed(Sampling):
    """Fields that chat and text completion requests share."""

    n: Annotated[Whole, Field(ge=1, le=MOST_CHOICES)] = 1
    stop: (
        Annotated[
            Annotated[StopText, Tag("str")] | Annotated[Several[StopText], Field(max_length=16), Tag("list[]")],
            which(text_or_list, "give a text, or a list of texts"),
        ]
        | None
    ) = None
    response_format: ResponseFormat | None = None
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
        if self.wants_usage and not self.stream:
            raise ValueError("stream_options are for streams; give stream as well")
        for name in ("ignore_eos", "min_tokens"):
            if self.response_format and getattr(self, name):
                raise ValueError(f"{name} would write beyond the JSON of response_format; leave out one of them")
        return self


TEMPLATE_ITSELF = {
    *("messages", "conversation", "chat_template", "tools", "documents", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "bos_token", "eos_token"),
}


class ChatRequest(Streamed):
    """chat_template_kwargs: variables of the chat template, such as enable_thinking; reasoning_effort is another one.
    A template that knows none of that name is as it is without."""

    messages: Annotated[Several[Message], Field(min_length=1)]
    tools: Annotated[Several[Tool], Field(max_length=128)] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=32)] | None = None
    reasoning_effort: str | None = None
    max_completion_tokens: Annotated[Whole, Field(ge=1, le=2**31)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[Whole, Field(ge=0, le=MOST_LIKELY)] | None = None

    @model_validator(mode="after")
    def check_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs; set it to true as well")
        return self

    @model_validator(mode="after")
    def check_tools(self) -> ChatRequest:
        named = named_tool(self.tool_choice)
        if self.tool_choice not in (None, "none", "auto", REQUIRED) and named is None:
            raise ValueError(
                'tool_choice may be auto, none, required, or {"type": "function", "function": {"name": ...}}'
            )
        if self.must_call and not self.callable_tools:
            missing = f"there is no tool {named} among them" if self.tools else "there are none"
            raise ValueError(f"tool_choice asks for a call of tools, and {missing}")
        if self.must_call and (self.ignore_eos or self.min_tokens):
            raise ValueError("ignore_eos and min_tokens would write beyond the call of tool_choice; leave them out")
        if self.usable_tools and self.response_format:
            raise ValueError("tools and response_format do not go together; leave out one of them")
        if self.usable_tools and self.parallel_tool_calls is False and not self.must_call:
            raise ValueError("parallel_tool_calls: false is served with tool_choice required only; leave it out")
        taken = TEMPLATE_ITSELF & (self.chat_template_kwargs or {}).keys()
        if taken:
            raise ValueError(f"chat_template_kwargs cannot set {min(taken)}; leave it out")
        return self

    @property
    def usable_tools(self) -> list[Tool]:
        """Those that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def must_call(self) -> bool:
        return self.tool_choice == REQUIRED or named_tool(self.tool_choice) is not None

    @property
    def callable_tools(self) -> list[Tool]:
        """Those that `tool_choice` leaves."""
        name = named_tool(self.tool_choice)
        return [tool for tool in self.usable_tools if name in (None, tool.function.name)]

    @property
    def several_calls(self) -> bool:
        """Whether a call that must be may be followed by others."""
        return named_tool(self.tool_choice) is None and self.parallel_tool_calls is not False

    @property
    def template_options(self) -> dict[str, Any]:
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return effort | (self.chat_template_kwargs or {})

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def kind_of_prompt(value: Any) -> str | None:
    if not isinstance(value, list):
        return text_or_list(value)
    first = value[0] if value else ""
    return "list[list]" if isinstance(first, list) else "list[str]" if isinstance(first, str) else "list[int]"


class CompletionRequest(Streamed):
    prompt: Annotated[
        Annotated[Text, Tag("str")]
        | Annotated[Several[Text], Field(min_length=1), Tag("list[str]")]
        | Annotated[Several[int], Tag("list[int]")]
        | Annotated[Several[Several[int]], Tag("list[list]")],
        which(kind_of_prompt, "give a text or token ids, or a list of either"),
    ]
    logprobs: Annotated[Whole, Field(ge=0, le=5)] | None = None
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
    """For `/v1/ctc/stream`. plain: decode without the drafter. answer: token ids of the answer so far, behind which it
    goes on as if it had not been cut."""

    messages: Annotated[Several[Message], Field(min_length=1)]
    plain: bool = False
    answer: Several[int] = Field(default_factory=list)


# Answers in OpenAI's shapes: the types of its client, and what they lack. What is not set is left out.

FinishReason = Literal["stop", "length", "tool_calls"]


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

    finish_reason: Literal["stop", "length"] | None  # type: ignore[assignment]
    token_ids: list[int] | None = None


class CompletionReply(openai.types.Completion):
    """A whole answer, or a piece of a stream."""

    choices: list[ChoiceWithTokens]  # type: ignore[assignment]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[openai.types.Model]


class Version(BaseModel):
    version: str


class Health(BaseModel):
    status: Literal["ok", "stopping"]
    running: int
    waiting: int


# What the page asks for: /v1/ctc/about, and the events of /v1/ctc/stream.


class About(BaseModel):
    """What is served. method: name of the drafter's method, None where nothing drafts. longest_prompt, longest_answer:
    in tokens; context: tokens of both together."""

    model: str
    method: str | None
    context: int
    longest_prompt: int
    longest_answer: int


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

    finish_reason: Literal["stop", "length"]
    tail: str
    usage: CompletionUsage
    verifications: int
    beta: float
    seconds: float
    prefill_seconds: float
