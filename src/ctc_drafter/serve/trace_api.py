"""Endpoints of the page: what is served, and the emitted tokens and verified tree of every step as a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi import APIRouter
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel

from ctc_drafter.drafters.registry import method_of
from ctc_drafter.serve.async_stream import EventStream, RequestStream
from ctc_drafter.serve.middleware import APIError
from ctc_drafter.serve.openai_api import ERRORS, STREAMED, TokenText, usage_of
from ctc_drafter.serve.protocol import About, TraceEnd, TraceNode, TracePiece, TraceRequest, TraceStep
from ctc_drafter.serve.requests import Finish, StepOutput
from ctc_drafter.serve.service import Service

PLAIN = "plain"  # the method without a drafter


def trace_router(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1/ctc", responses=ERRORS)

    @router.get("/about")
    async def about() -> About:
        """Model, method of the drafter, and how long prompts and answers may be."""
        return about_service(service)

    @router.post("/stream", response_class=StreamingResponse, responses=STREAMED)
    async def trace(body: TraceRequest) -> Response:
        """The answer to a conversation as server-sent events: `step` for the prefill and every verification, then
        `end`, or `error` in OpenAI's shape."""
        service.check_model(body.model)
        prompt, _ = await service.encoded(service.encode_chat, body.messages)
        if body.answer:
            prompt = service.check_prompt([*prompt, *body.answer])
        method = PLAIN if body.plain else None
        completions = service.completions([prompt], body, body.max_tokens, method=method, trace=True)
        completions[0].shown.follow(body.answer)
        request_stream = RequestStream(service.engine, completions)
        return EventStream(request_stream, lines(request_stream, TokenText(service.tokenizer, False)))

    return router


def about_service(service: Service) -> About:
    name, batch = next(iter(service.engine.batches.items()))
    return About(
        model=service.name,
        method=None if name == PLAIN else method_of(batch.method.drafter),
        context=service.target.context,
        longest_prompt=service.most_prompt,
        longest_answer=min(service.limits.max_new_tokens, service.target.context - 1),
    )


async def lines(request_stream: RequestStream, token_text: TokenText) -> AsyncIterator[str]:
    number = 0
    try:
        async for _, event in request_stream.events():
            if isinstance(event, StepOutput):
                yield named("step", step(number, event, token_text))
                number += 1
            else:
                yield named("end", end(request_stream, event))
    except APIError as error:
        yield named("error", error.body)


def step(number: int, output: StepOutput, token_text: TokenText) -> TraceStep:
    return TraceStep(
        number=number,
        seconds=output.seconds,
        pieces=[TracePiece(token=piece.token, text=piece.text) for piece in output.tokens],
        accepted=output.accepted,
        bonus=output.bonus,
        tree=[
            TraceNode(
                token=node.token,
                text=token_text.text(node.token),
                parent=node.parent,
                depth=node.depth,
                probability=node.probability,
                accepted=node.accepted,
            )
            for node in output.tree
        ],
    )


def end(request_stream: RequestStream, finish: Finish) -> TraceEnd:
    stats = finish.stats
    return TraceEnd(
        finish_reason=finish.reason,
        tail=finish.text,
        usage=usage_of(request_stream.completions, 1),
        verifications=stats.steps,
        beta=stats.beta,
        seconds=stats.seconds,
        prefill_seconds=stats.prefill_seconds,
    )


def named(event: str, value: BaseModel) -> str:
    return f"event: {event}\ndata: {value.model_dump_json(exclude_unset=True)}\n\n"
