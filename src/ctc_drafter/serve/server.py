"""`ctc-drafter serve`: FastAPI application, uvicorn and shutdown."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import math
import re
import socket
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import uvicorn
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST

from ctc_drafter.decode.batch import DecodingConfig, DecodingOptions, Method
from ctc_drafter.decode.generate import generate
from ctc_drafter.decode.profile import plain_method, settled
from ctc_drafter.drafters.base import Drafter
from ctc_drafter.serve import middleware
from ctc_drafter.serve.connections import (
    ConnectionLimits,
    Listener,
    end_unread,
    hosts_of,
    is_loopback,
    protocol,
    room_for_connections,
)
from ctc_drafter.serve.engine import Engine, Speedup, Worker, time_plain_steps
from ctc_drafter.serve.metrics import Metrics
from ctc_drafter.serve.middleware import Middleware, check_key
from ctc_drafter.serve.openai_api import openai_router
from ctc_drafter.serve.protocol import Health, Version
from ctc_drafter.serve.responses_api import responses_router
from ctc_drafter.serve.service import Service
from ctc_drafter.serve.trace_api import PLAIN, trace_router
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError

# uvicorn on a socket, until SIGINT or SIGTERM.

LOG = logging.getLogger(__name__)
BACKLOG = 128
KEEP_ALIVE = 75.0  # seconds: longer than proxies keep idle connections in their pools, which is 60 for most


def make_engine(
    target: Target,
    drafter: Drafter | None,
    batch_size: int,
    queue: int,
    config: DecodingConfig | None = None,
    worker: Worker | None = None,
    **options: Unpack[DecodingOptions],
) -> Engine:
    """Not started yet, and to be called on its worker. Trees are as `config` says, or its fields by name; see
    `generate`.

    Both methods are tried first, so that the first request finds everything compiled.
    """
    config = DecodingConfig.of(config, options).without_sampler("every request has its own")
    plain = plain_method(target)
    methods = {PLAIN: plain}
    if drafter is not None:
        fixed = replace(config, nodes=config.fixed_nodes, budget=None)  # what it measures comes next
        generate(target, drafter, [[0, 0]], max_new_tokens=8, config=fixed, eos=())
        methods = {"draft": settled(Method(target, drafter, config), batch_size), PLAIN: plain}
    return Engine(methods, batch_size, queue, Speedup(time_plain_steps(target, batch_size)), worker)


class Server(uvicorn.Server):
    """uvicorn server whose shutdown lets running answers end for a while, and closes streams properly."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.engine.drain(self.service.limits.grace)
        await super().shutdown(sockets)


def serve(
    make: Callable[[], Service],
    api_key: str | None,
    host: str,
    port: int,
    allowed_hosts: Sequence[str] = (),
    origins: Sequence[str] = (),
    keep_alive: float = KEEP_ALIVE,
) -> None:
    """Serves what `make` loads until SIGINT or SIGTERM.

    allowed_hosts: names that requests may be sent to; on a loopback address besides its own, elsewhere any without.
    origins: see `create_app`. keep_alive: seconds that a connection may be idle between requests.
    Raises `UserError`, before anything is loaded, when it cannot listen there or no client could send that key.
    """
    check_key(api_key)
    check_origins(origins)
    hosts_of(host, allowed_hosts)
    with bind(host, port) as listener:
        serve_on(listener, make(), api_key, host, allowed_hosts, origins, keep_alive)


def serve_on(
    listener: socket.socket,
    service: Service,
    api_key: str | None,
    host: str,
    allowed_hosts: Sequence[str] = (),
    origins: Sequence[str] = (),
    keep_alive: float = KEEP_ALIVE,
) -> None:
    with listening_errors(host, listener.getsockname()[1]):  # another server may have been faster
        listener.listen(BACKLOG)
    if api_key is None and not is_loopback(host):
        LOG.warning("anyone who reaches %s may use this server; give --api-key", host)
    hosts, most = hosts_of(host, allowed_hosts), room_for_connections()
    server = make_server(service, api_key, hosts, most, origins, keep_alive)
    with service.engine, contextlib.suppress(KeyboardInterrupt):
        with contextlib.suppress(OSError):  # nobody reads it
            # The command's own output, whatever the log leaves out: who starts a server waits for its address.
            print(f"serving {service.name} on {address(listener)}; Ctrl-C stops it", flush=True)
        server.run(sockets=[listener])


def make_server(
    service: Service,
    api_key: str | None = None,
    hosts: Collection[str] | None = None,
    most: int = ConnectionLimits.most,
    origins: Sequence[str] = (),
    keep_alive: float = KEEP_ALIVE,
    **seconds: float,
) -> Server:
    """hosts, origins: see `create_app`. keep_alive: see `serve`. most, seconds: of connections, `ConnectionLimits`."""
    within = {"request": service.limits.timeout + 2 * SLACK, **seconds}
    limits = ConnectionLimits(most=most, **within)
    config = uvicorn.Config(
        create_app(service, api_key, hosts, origins),
        http=protocol(limits),
        loop="asyncio",  # others take connections without the listener's `accept`
        backlog=BACKLOG,
        log_level="warning",
        access_log=False,  # the middleware has its own, which knows more
        timeout_keep_alive=math.ceil(keep_alive),
        server_header=False,
        limit_concurrency=most + 1,
        timeout_graceful_shutdown=int(service.limits.grace) + 5,
    )
    return Server(config, service)


def bind(host: str, port: int) -> socket.socket:
    """A socket that has the address and does not listen yet: clients are refused. Raises `UserError`."""
    with listening_errors(host, port):
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = Listener(family, socket.SOCK_STREAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            end_unread(bound, ConnectionLimits.flush)
            bound.bind(place)
        except OSError:
            bound.close()
            raise
        return bound


@contextlib.contextmanager
def listening_errors(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}, port {port}: {error}; give another --host or --port") from error


def address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


# The web application around a service.

PAGE = Path(__file__).parent / "page"
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#@]+", re.IGNORECASE)
SLACK = 30.0  # seconds to read and write a request beyond those of its answer


def create_app(
    service: Service,
    api_key: str | None = None,
    hosts: Collection[str] | None = None,
    origins: Sequence[str] = (),
) -> FastAPI:
    """OpenAI's API, our own stream, health, metrics and the page. The engine is started and stopped by the caller.

    api_key: clients must send it under /v1/; None lets everybody in. hosts: names that requests may be sent to, in
    lower case; None for any. origins: of pages that browsers may let see the answers, see `check_origins`.
    """
    app = FastAPI(
        title="CTC-drafter",
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
    )
    metrics, limits = Metrics(service.engine), service.limits
    seconds = limits.timeout + SLACK
    app.add_middleware(
        Middleware,
        api_key=api_key,
        max_body=limits.max_body,
        seconds=seconds,
        metrics=metrics,
        hosts=hosts,
        lenient=limits.lenient,
    )
    if origins:  # outermost: browsers ask beforehand, without the key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=check_origins(origins),
            allow_methods=["GET", "POST", "HEAD"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    middleware.install(app)
    app.include_router(openai_router(service))
    app.include_router(responses_router(service))
    app.include_router(trace_router(service))

    @app.get("/health", responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        """Health check: whether requests are accepted."""
        load = service.engine.load()
        response.status_code = 200 if load.open else 503
        return Health(status="ok" if load.open else "stopping", running=load.running, waiting=load.waiting)

    @app.get("/version")
    async def version() -> Version:
        """The server's version."""
        return Version(version=importlib.metadata.version("ctc-drafter"))

    @app.get("/metrics", response_class=PlainTextResponse)
    async def figures() -> Response:
        """Figures for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE))
    return app


def check_origins(origins: Sequence[str]) -> list[str]:
    """The same, as browsers write them. Raises `UserError` for what is none: `https://chat.example`, or `*` for any."""
    for origin in origins:
        if origin != "*" and not ORIGIN.fullmatch(origin):
            raise UserError(f"{origin} is no origin; give scheme and host, such as https://chat.example, or * for any")
    return [origin.lower() for origin in origins]
