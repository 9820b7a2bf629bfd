"""ASGI middleware (API key, limits of size and time, count of requests) and errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ctc_drafter.serve.engine import QueueFull, ShuttingDown
from ctc_drafter.serve.metrics import Metrics
from ctc_drafter.serve.protocol import ErrorBody, ErrorReply
from ctc_drafter.types import UserError

# Errors in OpenAI's shape.

LOG = logging.getLogger(__name__)
RETRY_AFTER_SHUTDOWN = "5"
MEMBERS = ("str", "int", "float", "bool")
CLIENT_GONE = 499  # nobody reads it


class APIError(Exception):
    """An answer that is an error. kind: OpenAI's type of error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers
        # What a client sent may hold half an emoji, which no answer can carry.
        message, param = message.encode(errors="replace").decode(), param and param.encode(errors="replace").decode()
        self.body = ErrorReply(error=ErrorBody(message=message, type=kind(status), param=param, code=code))


def kind(status: int) -> str:
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def respond(error: APIError) -> JSONResponse:
    return JSONResponse(error.body.model_dump(), error.status, error.headers)


def explain(errors: Sequence[Mapping[str, Any]]) -> APIError:
    """The first thing that is wrong with a request, in one line."""
    first = errors[0]
    path = [str(part) for part in first["loc"]]
    path = path[1:] if path[:1] == ["body"] else path
    unknown = first["type"] == "extra_forbidden"
    place = ".".join([*filter(is_ours, path[:-1]), *path[-1:]] if unknown else filter(is_ours, path))
    if first["type"] == "json_invalid":
        return APIError(400, "the body is not valid JSON")
    if unknown:
        return APIError(400, f"unknown field {place}; leave it out", param=place)
    message = str(first["msg"]).removeprefix("Value error, ")
    return APIError(400, f"{place}: {message}" if place else message, param=place or None)


def is_ours(part: str) -> bool:
    """Whether a part of a path is a field's name or a place in a list, and no member of a union that was tried."""
    return part.isdigit() or (part not in MEMBERS and part.replace("_", "").isalnum() and part.islower())


def translate(error: Exception) -> APIError:
    """What the client is told about an error of ours."""
    match error:
        case APIError():
            return error
        case UserError():
            return APIError(400, " ".join(str(error).split()))
        case QueueFull():
            headers = {"Retry-After": str(error.seconds)}
            return APIError(429, str(error), code="queue_full", headers=headers)
        case ShuttingDown():
            headers = {"Retry-After": RETRY_AFTER_SHUTDOWN}
            return APIError(503, "the server is shutting down", code="shutdown", headers=headers)
        case RequestValidationError():
            return explain(error.errors())
        case HTTPException():
            return APIError(error.status_code, str(error.detail), headers=error.headers)
    LOG.error("a request failed", exc_info=error)
    return APIError(500, "the server failed; its log says why")


def install(app: FastAPI) -> None:
    async def handle(_request: Request, error: Exception) -> JSONResponse:
        return respond(translate(error))

    for known in (APIError, UserError, QueueFull, ShuttingDown, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(known, handle)


# What every request passes first: the API key, limits of size and time, the count.

PROTECTED = "/v1/"


class Middleware:
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
