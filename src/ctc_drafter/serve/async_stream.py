"""Event streams between the asyncio loop and the engine's thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ctc_drafter.serve.engine import Engine
from ctc_drafter.serve.middleware import CLIENT_GONE, APIError
from ctc_drafter.serve.requests import Completion, Event, Failure, Finish, StepOutput, TokenOutput

STATUS = {"timeout": 504, "shutdown": 503, "error": 500}
T = TypeVar("T")


@dataclass
class Answer:
    """One complete choice."""

    finish: Finish
    text: str = ""
    tokens: list[TokenOutput] = field(default_factory=list)


class RequestStream:
    """Completions at the engine. Made inside the event loop; raises what `Engine.submit` raises."""

    def __init__(self, engine: Engine, completions: Sequence[Completion]):
        self.completions = list(completions)
        # No bound is needed: a completion delivers no more events than it has tokens, and two.
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        for place, completion in enumerate(self.completions):
            completion.deliver = partial(self._deliver, place)
        engine.submit(self.completions)

    def _deliver(self, place: int, event: Event) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (place, event))
        except RuntimeError:  # the loop is closed: nobody is there
            self.completions[place].cancelled = True

    def cancel(self) -> None:
        """Cancels the completions; their rows leave at the next step."""
        for completion in self.completions:
            completion.cancelled = True

    async def events(self) -> AsyncIterator[tuple[int, StepOutput | Finish]]:
        """Events of all completions with their index, until all have finished. Raises `APIError` when one fails."""
        going = len(self.completions)
        while going:
            place, event = await self._queue.get()
            if isinstance(event, Failure):
                raise APIError(STATUS[event.reason], event.message, code=event.reason)
            yield place, event
            going -= isinstance(event, Finish)

    async def collect(self) -> list[Answer]:
        """All answers, complete."""
        outputs: list[list[StepOutput | Finish]] = [[] for _ in self.completions]
        async for place, event in self.events():
            outputs[place].append(event)
        answers = []
        for events in outputs:
            finish = events[-1]
            assert isinstance(finish, Finish)
            tokens = [token for event in events for token in event.tokens]
            answers.append(Answer(finish, "".join(event.text for event in events), tokens))
        return answers


class EventStream(StreamingResponse):
    """Server-sent events of a request, which is cancelled when the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, request_stream: RequestStream, lines: AsyncIterator[str]):
        super().__init__(lines, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.request_stream = request_stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.request_stream.cancel()


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise APIError(CLIENT_GONE, "the client has gone")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
