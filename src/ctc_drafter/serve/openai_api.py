"""OpenAI's API: chat completions, completions, models."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from ctc_drafter.serve.errors import APIError
from ctc_drafter.serve.exchange import EventStream, Exchange, unless_gone
from ctc_drafter.serve.forms import ChatForm, CompletionForm, Form, Wording, usage_of
from ctc_drafter.serve.jobs import Finish, Job
from ctc_drafter.serve.replies import ChatReply, CompletionReply, ErrorReply, Model, ModelList
from ctc_drafter.serve.schema import ChatRequest, CompletionRequest, Streamed
from ctc_drafter.serve.service import Service

SHORT = 16  # tokens of a completion that does not say, as OpenAI has it
DONE = "data: [DONE]\n\n"
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply} for status in (400, 401, 404, 408, 413, 429, 503, 504)
}


def openai_router(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", responses=ERRORS)

    @router.get("/models")
    async def models() -> ModelList:
        """The one model that is served."""
        return ModelList(data=[Model(id=service.name, created=service.created)])

    @router.get("/models/{model:path}")
    async def model(model: str) -> Model:
        """What `/v1/models` says of it."""
        service.check_model(model)
        return Model(id=service.name, created=service.created)

    @router.post("/chat/completions", response_model=ChatReply)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """The answer to a conversation; with `stream`, as server-sent events."""
        service.check_model(body.model)
        prompt = await run_in_threadpool(service.encode_chat, body.messages)
        jobs = service.jobs([prompt], body, body.limit, n=body.n, stop=body.stops, top=body.likeliest)
        form = ChatForm(service.name, Wording(service.tokenizer, body.logprobs))
        return await answer(service, body, request, jobs, form)

    @router.post("/completions", response_model=CompletionReply)
    async def completion(body: CompletionRequest, request: Request) -> Response:
        """The continuation of a text, or of several; without max_tokens 16 tokens of it."""
        service.check_model(body.model)
        service.check_choices(len(body.prompts) * body.n)
        prompts = await run_in_threadpool(encode_all, service, body.prompts)
        limit = body.max_tokens or SHORT
        jobs = service.jobs(prompts, body, limit, n=body.n, stop=body.stops, top=body.logprobs)
        form = CompletionForm(
            service.name, Wording(service.tokenizer, body.logprobs is not None), body.return_token_ids
        )
        return await answer(service, body, request, jobs, form)

    return router


def encode_all(service: Service, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    return [
        service.encode_text(prompt, place) if isinstance(prompt, str) else service.check_prompt(prompt, place)
        for place, prompt in enumerate(prompts)
    ]


async def answer(service: Service, body: Streamed, request: Request, jobs: list[Job], form: Form) -> Response:
    exchange = Exchange(service.engine, jobs)
    if body.stream:
        return EventStream(exchange, stream(exchange, form, body))
    try:
        answers = await unless_gone(request, exchange.collect())
    finally:
        exchange.cancel()

    def written() -> str:
        return form.whole(answers, usage_of(jobs, body.n)).model_dump_json()

    return Response(await run_in_threadpool(written), media_type="application/json")  # thousands of likelihoods


async def stream(exchange: Exchange, form: Form, body: Streamed) -> AsyncIterator[str]:
    """Lines of server-sent events. An error ends the stream as OpenAI's client expects it."""
    for chunk in form.opening(len(exchange.jobs)):
        yield data(chunk)
    try:
        async for place, event in exchange.events():
            reason = event.reason if isinstance(event, Finish) else None
            if event.text or event.tokens or reason:
                yield data(form.piece(place, event.text, event.tokens, reason))
        if body.wants_usage:
            yield data(form.closing(usage_of(exchange.jobs, body.n)))
    except APIError as error:
        yield data(error.body)
    yield DONE


def data(value: BaseModel) -> str:
    return f"data: {value.model_dump_json()}\n\n"
