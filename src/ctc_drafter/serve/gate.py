"""What every request passes first: the API key, limits of size and time, the count."""

from __future__ import annotations

import asyncio
import hmac
import time
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ctc_drafter.serve.errors import CLIENT_GONE, APIError, respond
from ctc_drafter.serve.metrics import Metrics

PROTECTED = "/v1/"


class Gate:
    """ASGI middleware. api_key: needed under /v1/, None for none. max_body: bytes of a request. seconds: of a request
    from its head to the last byte of the answer, so that slow writers and slow readers hold nothing for ever."""

    def __init__(self, app: ASGIApp, api_key: str | None, max_body: int, seconds: float, metrics: Metrics):
        self.app, self.api_key, self.max_body, self.seconds, self.metrics = app, api_key, max_body, seconds, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status, size = time.perf_counter(), 0, 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.max_body:
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, self._too_large())
            return message

        try:
            async with asyncio.timeout(self.seconds):
                refusal = self._refusal(scope)
                if refusal is not None:
                    await respond(refusal)(scope, receive, noted)
                else:
                    await self.app(scope, counted, noted)
        except TimeoutError:
            if not status:
                late = APIError(408, "the request took too long", code="timeout")
                await respond(late)(scope, receive, noted)
        except Exception:  # answered further out, with a 500
            status = status or 500
            raise
        finally:
            # Nobody reads the answer to a client that has gone.
            self.metrics.count(scope["path"], 0 if status == CLIENT_GONE else status, time.perf_counter() - begin)

    def _refusal(self, scope: Scope) -> APIError | None:
        headers = dict(reversed(scope["headers"]))
        if self.api_key is not None and scope["path"].startswith(PROTECTED):
            wanted = b"Bearer " + self.api_key.encode()
            if not hmac.compare_digest(headers.get(b"authorization", b""), wanted):
                message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
                return APIError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body:
            return APIError(413, self._too_large())
        return None

    def _too_large(self) -> str:
        return f"the request may have {self.max_body} bytes; send less"
