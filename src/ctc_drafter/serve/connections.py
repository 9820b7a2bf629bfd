"""Limits of TCP connections (number, time, size, file descriptors), and the Host check against DNS rebinding.

uvicorn limits requests, not connections: one that sends no request, drips a body behind its answer, or does not read
what it asked for stays for ever. Here each has a deadline from its first byte on, and what is sent behind an answer is
neither parsed nor kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import re
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ctc_drafter.types import UserError

LOG = logging.getLogger(__name__)
MOST_CONNECTIONS = 1024
SPARE_FILES = 32  # descriptors left for logs, pages that are sent, and what libraries open
MOST_TURNED_AWAY = 64  # connections beyond the most that hear "503" before others are dropped unheard
FREE_CHUNKS, CHUNK_BYTES = 4096, 256  # chunks of a body that may be small, and the least bytes of those beyond
MOST_HEAD = 16 << 10  # bytes of a request's head, h11's default
NO_DESCRIPTOR = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
DROPPED_AT_ONCE = 128
QUIET = 10.0  # seconds between two lines of the log that say the same
TURNED_AWAY = "no file descriptor is free: new connections are dropped; raise the limit (ulimit -n)"


@dataclass(frozen=True)
class ConnectionLimits:
    """most: connections that are served. head, request, flush: seconds for a request's head, for a request from its
    head to the last byte handed to the socket, and for the client to take what is left of the answer. linger: seconds
    in which a client whose request was answered early may go on sending."""

    most: int = MOST_CONNECTIONS
    head: float = 30.0
    request: float = 335.0
    flush: float = 30.0
    linger: float = 2.0

    @property
    def dropped_at(self) -> int:
        return self.most + max(1, min(MOST_TURNED_AWAY, self.most // 4))


def room_for_connections(wanted: int = MOST_CONNECTIONS) -> int:
    """Connections that this process's limit of open files allows, at most `wanted`; the limit is raised first.

    A line in the log says so where they are fewer. Raises `UserError` where there is room for none.
    """
    try:
        import resource
    except ImportError:  # not a POSIX system
        return wanted
    # Turned away: a quarter more, see `dropped_at`.
    needed = wanted + MOST_TURNED_AWAY + SPARE_FILES + open_files()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
        with contextlib.suppress(OSError, ValueError):  # some systems refuse; what is set counts
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    room = soft - open_files() - SPARE_FILES
    most = min(wanted, room - min(MOST_TURNED_AWAY, room // 5) - 1)
    if most < 1:
        raise UserError(f"this process may open {soft} files, which leaves none for clients; raise it: ulimit -n 2048")
    LOG.warning("this process may open %d files: %d connections are taken; for more: ulimit -n %d", soft, most, needed)
    return most


def open_files() -> int:
    """File descriptors in use, by /proc or /dev; a guess elsewhere."""
    for folder in ("/proc/self/fd", "/dev/fd"):
        if Path(folder).is_dir():
            return len(os.listdir(folder))  # noqa: PTH208
    return 32


class Listener(socket.socket):
    """Listening socket that drops connections while no file descriptor is free, and says so in the log now and then.

    asyncio logs a traceback for each of `backlog` attempts, and schedules as many retries, each of which does the same
    (cpython issue 151615): the log grows by megabytes and the event loop does nothing else. The one descriptor that is
    kept for this takes the connection and closes it, so that the queue of waiting ones empties.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.spare: int | None = os.open(os.devnull, os.O_RDONLY)
        self.said = -QUIET

    def accept(self) -> tuple[socket.socket, Any]:
        for _ in range(DROPPED_AT_ONCE):  # then the event loop has its turn
            try:
                return super().accept()
            except OSError as error:
                if error.errno not in NO_DESCRIPTOR:
                    raise
                if time.monotonic() - self.said >= QUIET:
                    self.said = time.monotonic()
                    LOG.error(TURNED_AWAY)
                self._drop()  # raises BlockingIOError when nobody waits any more
        raise BlockingIOError

    def _drop(self) -> None:
        if self.spare is not None:
            os.close(self.spare)
            self.spare = None
        try:
            super().accept()[0].close()
        except OSError as error:
            if error.errno in NO_DESCRIPTOR:  # another thread was faster: nothing can be done now
                time.sleep(0.01)
                raise BlockingIOError from error
            raise
        finally:
            with contextlib.suppress(OSError):
                self.spare = os.open(os.devnull, os.O_RDONLY)

    def close(self) -> None:
        if self.spare is not None:
            os.close(self.spare)
            self.spare = None
        super().close()


def end_unread(listener: socket.socket, seconds: float) -> None:
    """Lets the system end connections whose client has not taken a byte for so long; accepted sockets inherit it."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; elsewhere `ConnectionLimits.flush` alone does
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))


def protocol(limits: ConnectionLimits) -> type[asyncio.Protocol]:
    """For `uvicorn.Config(http=...)`."""
    return cast(type[asyncio.Protocol], partial(Connection, limits=limits))


class CountedChunks(h11.Connection):
    """Refuses bodies of very many tiny chunks, which cost far more time than their bytes would tell."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.chunks = self.bytes = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.chunks = self.bytes = 0
        elif isinstance(event, h11.Data):
            self.chunks += event.chunk_start
            self.bytes += len(event.data)
            if self.chunks > FREE_CHUNKS + self.bytes // CHUNK_BYTES:
                raise h11.RemoteProtocolError("the body comes in too many tiny chunks")
        return event


class Connection(H11Protocol):
    """HTTP/1.1 connection of uvicorn with a deadline for whatever it waits for; see `ConnectionLimits`."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **options: Any) -> None:
        super().__init__(*args, **options)
        self.limits = limits
        self.conn = CountedChunks(h11.SERVER, self.config.h11_max_incomplete_event_size or MOST_HEAD)
        self.deadline: asyncio.TimerHandle | None = None
        self.in_head = self.lingering = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, LingeringTransport(transport, self)))
        if len(self.connections) > self.limits.dropped_at:
            transport.abort()
            return
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.lingering or self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE and not self.in_head:
            self._begin_head()
        super().data_received(data)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self.in_head = False
            self._allow(self.limits.request, self._abort)

    def on_response_complete(self) -> None:
        if not self.lingering:
            self._allow(self.limits.flush, self._abort_unread)
        super().on_response_complete()
        # The rest of a request whose answer is there already is nothing that anyone reads.
        if self.conn.their_state is h11.SEND_BODY and self.conn.our_state in (h11.DONE, h11.MUST_CLOSE):
            self.transport.close()
        elif self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:  # the next head has begun
            self._begin_head()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            if self.cycle is not None:  # what it would answer has no place behind this
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            super().send_400_response(msg)
        else:  # an answer is on its way, or was given: there is no place for another one
            self.transport.abort()

    def linger(self) -> bool:
        """Whether the client is still sending: then the answer's end is told, and the rest discarded for a while."""
        if self.lingering or self.conn.their_state is not h11.SEND_BODY or not self.transport.can_write_eof():
            return False
        self.lingering = True
        self._unset_keepalive_if_required()
        self.flow.resume_reading()
        self.transport.write_eof()
        self._allow(self.limits.linger, self._abort)
        return True

    def _begin_head(self) -> None:
        self.in_head = True
        self._allow(self.limits.head, self._abort)

    def _allow(self, seconds: float, late: Any) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
        self.deadline = self.loop.call_later(seconds, late)

    def _abort(self) -> None:
        self.transport.abort()

    def _abort_unread(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()


class LingeringTransport:
    """A transport whose `close` lets a client that is still sending read its answer first.

    A socket that is closed with unread data answers with a reset, which makes the client's system drop the answer.
    """

    def __init__(self, transport: asyncio.Transport, connection: Connection):
        self._transport, self._connection = transport, connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._connection.lingering or self._transport.is_closing()

    def close(self) -> None:
        if self._transport.is_closing() or not self._connection.linger():
            self._transport.close()


# Which names a request may call the server by: a page whose name was rebound to this machine still sends its own.

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
HOST = re.compile(r"(?:\[(?P<address>[0-9a-f:.%]+)\]|(?P<name>[^\s/@?#\\,:\[\]]+))(?::\d*)?")


def is_loopback(host: str) -> bool:
    """Whether an address that is listened on is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def hosts_of(host: str, allowed: Sequence[str]) -> frozenset[str] | None:
    """The names that requests may be sent to, in lower case; None for any.

    On a loopback address they are its names and those of `allowed`; elsewhere those of `allowed`, if there are any.
    Raises `UserError` for a name that is none.
    """
    named = {host_name(f"[{each}]" if each.count(":") > 1 and "[" not in each else each) for each in allowed}
    if "" in named:
        raise UserError(f"{', '.join(allowed)}: not a host name; give --allowed-host a name alone, such as llm.example")
    if "*" in named or (not named and not is_loopback(host)):
        return None
    return frozenset(named | {*LOOPBACK_NAMES, host.lower()} if is_loopback(host) else named)


def host_name(header: str) -> str:
    """The name of a Host header without its port, in lower case; empty for what is none."""
    found = HOST.fullmatch(header.strip().lower())
    return (found["address"] or found["name"].rstrip(".")) if found else ""
