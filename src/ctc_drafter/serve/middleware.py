"""ASGI middleware (API key, time limit, request counts) and errors in OpenAI's format."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
from collections.abc import Collection, Mapping, Sequence
from http import HTTPStatus
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ctc_drafter.serve.connections import host_name
from ctc_drafter.serve.engine import QueueFull, ShuttingDown
from ctc_drafter.serve.messages import IGNORED, UNKNOWN
from ctc_drafter.serve.metrics import Metrics
from ctc_drafter.serve.protocol import ErrorBody, ErrorReply
from ctc_drafter.types import UserError

# Errors in OpenAI's shape.

LOG = logging.getLogger(__name__)
RETRY_AFTER_SHUTDOWN = "5"
MEMBERS = ("str", "int", "float", "bool")
NO_OBJECT = ("model_type", "dict_type", "model_attributes_type", "missing")
CLIENT_GONE = 499  # nobody reads it
LONGEST_MESSAGE = 600  # characters of an error; what a client sent may be repeated in it


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
        param = param and sendable(param)
        self.body = ErrorReply(error=ErrorBody(message=sendable(message), type=kind(status), param=param, code=code))


def sendable(text: str) -> str:
    """A text that an answer can carry: what a client sent may hold half an emoji, or be long."""
    half = LONGEST_MESSAGE // 2
    short = text if len(text) <= LONGEST_MESSAGE else f"{text[:half]} ... {text[-half:]}"
    return short.encode(errors="replace").decode()


def kind(status: int) -> str:
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def respond(error: APIError) -> JSONResponse:
    return JSONResponse(error.body.model_dump(), error.status, error.headers)


def explain(errors: Sequence[Mapping[str, Any]]) -> APIError:
    """The first validation error of a request, in one line."""
    first = errors[0]
    path = [str(part) for part in first["loc"]]
    path = path[1:] if path[:1] == ["body"] else path
    unknown = first["type"] == UNKNOWN
    place = ".".join([*filter(is_ours, path), *([str(first["ctx"]["field"])] if unknown else [])])
    if first["type"] == "json_invalid":
        return APIError(400, "the body is not valid JSON")
    if not path and first["type"] in NO_OBJECT:
        if isinstance(first.get("input"), bytes | str):
            return APIError(400, "the body is not declared as JSON; send the header 'Content-Type: application/json'")
        return APIError(400, "the body is no JSON object; give one, with the fields of the request")
    if unknown:
        near = first["ctx"]["near"]
        advice = f"did you mean {near[0]}?" if near else "leave it out"
        return APIError(400, f"unknown field {place}; {advice}", param=place)
    message = str(first["msg"]).removeprefix("Value error, ")
    return APIError(400, f"{place}: {message}" if place else message, param=place or None)


def is_ours(part: str) -> bool:
    """Whether a part of a path is a field's name or a place in a list, and no member of a union that was tried."""
    return part.isdigit() or (part not in MEMBERS and part.replace("_", "").isalnum() and part.islower())


def translate(error: Exception) -> APIError:
    """The `APIError` that a client gets for an exception."""
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


# ASGI middleware: API key, limits of size and time, request count.

PROTECTED = "/v1/"
KEY = re.compile(r"[!-~]+")
SCHEME = b"bearer"
FIELD, NAMED_FIELDS = re.compile(r"\w{1,40}", re.ASCII), 8  # of a request, as the log names them
# Nothing of the page may be framed, and no answer be taken for another kind of file than it says.
SAFETY = ((b"x-content-type-options", b"nosniff"), (b"x-frame-options", b"DENY"))
# Answers to requests that were not read to their end: a client that goes on sending is not listened to.
LAST = {HTTPStatus.UNAUTHORIZED, HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.REQUEST_ENTITY_TOO_LARGE}


def check_key(key: str | None) -> None:
    """Raises `UserError` for an API key that no client could send."""
    if key is None or KEY.fullmatch(key):
        return
    what = "is empty" if not key else "holds a space, a line break or other than ASCII characters"
    raise UserError(f"the API key {what}, and no client can send that; give letters, digits and signs, or leave it out")


class Middleware:
    """ASGI middleware. api_key: needed under /v1/, None for none. max_body: bytes of a request. seconds: of a request
    from its head to the last byte of the answer; connections have limits of their own (`connections.py`). hosts: names
    that requests may be sent to, None for any. lenient: whether unknown fields are left out and counted."""

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None,
        max_body: int,
        seconds: float,
        metrics: Metrics,
        hosts: Collection[str] | None = None,
        lenient: bool = False,
    ):
        self.app, self.api_key, self.max_body, self.seconds, self.metrics = app, api_key, max_body, seconds, metrics
        self.hosts, self.lenient = hosts, lenient

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status, size = time.perf_counter(), 0, 0
        scope, ignored = plain_path(scope), IGNORED.set([] if self.lenient else None)

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                last = [(b"connection", b"close")] if status in LAST else []
                message = {**message, "headers": [*map(stay_here, message.get("headers", ())), *SAFETY, *last]}
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
            seconds = time.perf_counter() - begin
            self.metrics.count(scope["path"], 0 if status == CLIENT_GONE else status, seconds)
            names = IGNORED.get() or []
            IGNORED.reset(ignored)
            self.metrics.ignored(len(names))
            log_request(scope, status, seconds, names)

    def _refusal(self, scope: Scope) -> APIError | None:
        headers = dict(reversed(scope["headers"]))
        if self.hosts is not None and b"host" in headers:
            named = host_name(headers[b"host"].decode("latin-1"))
            if named not in self.hosts:
                message = f"this server is not called {named or 'that'}; start it with --allowed-host NAME to allow it"
                return APIError(403, message, code="host_not_allowed")
        if b"transfer-encoding" in headers and b"content-length" in headers:
            message = "the request has both a Content-Length and a Transfer-Encoding; send one of them"
            return APIError(400, message, headers={"Connection": "close"})
        if self.api_key is not None and scope["path"].startswith(PROTECTED):
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            given = key.strip() if scheme.lower() == SCHEME else b""
            if not hmac.compare_digest(given, self.api_key.encode()):
                message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
                return APIError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body:
            return APIError(413, self._too_large())
        return None

    def _too_large(self) -> str:
        return f"the request may have {self.max_body} bytes; send less"


def plain_path(scope: Scope) -> Scope:
    """The same request for the routes, and for who may see them: HEAD as GET, whose body uvicorn leaves out, and no
    slashes too many, as base URLs that end in one make them."""
    path = re.sub("//+", "/", scope["path"])
    path = path if path.startswith("/page/") else path.rstrip("/") or "/"
    return {**scope, "path": path, "method": "GET" if scope["method"] == "HEAD" else scope["method"]}


def log_request(scope: Scope, status: int, seconds: float, ignored: Sequence[str] = ()) -> None:
    """One line; that somebody looks how the server is counts as a detail. ignored: fields of the request, of which the
    first few are named as far as they are names."""
    client = (scope.get("client") or ("-",))[0]
    path = quote(scope["path"])
    level = logging.DEBUG if scope["path"] in ("/health", "/metrics") else logging.INFO
    fields: dict[str, Any] = {
        "client": client,
        "method": scope["method"],
        "path": path,
        "status": status,
        "seconds": round(seconds, 4),
    }
    line = f"{client} {scope['method']} {path} {status} {seconds:.3f} s"
    if ignored:
        fields["ignored"] = [name if FIELD.fullmatch(name) else "?" for name in sorted(set(ignored))[:NAMED_FIELDS]]
        line += f", fields ignored: {', '.join(fields['ignored'])}"
    LOG.log(level, line, extra={"fields": fields})


def stay_here(header: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    """A redirect without the name that the client called this server by: the Host header can say anything."""
    name, value = header
    if name.lower() != b"location":
        return header
    parts = urlsplit(value.decode("latin-1"))
    return name, urlunsplit(("", "", "/" + parts.path.lstrip("/"), parts.query, parts.fragment)).encode("latin-1")
