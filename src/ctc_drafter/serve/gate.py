"""What every request passes first: the API key, the time limit, the count."""

from __future__ import annotations

import asyncio
import hmac
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ctc_drafter.serve.errors import APIError, respond
from ctc_drafter.serve.metrics import Metrics

PROTECTED = "/v1/"


class Gate:
    """ASGI middleware. api_key: needed under /v1/, None for none. seconds: of a request from its head to the last byte
    of the answer, so that slow writers and slow readers hold nothing for ever."""

    def __init__(self, app: ASGIApp, api_key: str | None, seconds: float, metrics: Metrics):
        self.app, self.api_key, self.seconds, self.metrics = app, api_key, seconds, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            async with asyncio.timeout(self.seconds):
                if scope["path"].startswith(PROTECTED) and not self._may_enter(scope):
                    await refusal()(scope, receive, noted)
                else:
                    await self.app(scope, receive, noted)
        except TimeoutError:
            if not status:
                late = APIError(408, "the request took too long", code="timeout")
                await respond(late)(scope, receive, noted)
        finally:
            self.metrics.count(scope["path"], status, time.perf_counter() - begin)

    def _may_enter(self, scope: Scope) -> bool:
        if self.api_key is None:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(given, b"Bearer " + self.api_key.encode())


def refusal() -> ASGIApp:
    error = APIError(
        401,
        "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
    return respond(error)
