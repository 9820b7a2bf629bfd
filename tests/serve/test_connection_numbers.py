"""How many connections there may be, and what happens when file descriptors run out."""

import errno
import logging
import resource
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, closing

import httpx2 as httpx
import pytest
from test_connections import GET, SOON, connect, seconds_until_ended

from ctc_drafter.serve.connections import (
    TURNED_AWAY,
    Listener,
    open_files,
    room_for_connections,
)
from ctc_drafter.serve.server import bind
from ctc_drafter.types import UserError
from serve_helpers import running, tiny_service, wait_until

pytestmark = pytest.mark.slow


def test_beyond_the_most_connections_clients_hear_503_and_are_then_dropped():
    with running(tiny_service(), most=4) as at, ExitStack() as stack:
        held = [stack.enter_context(connect(at)) for _ in range(4)]
        wait_until(lambda: len(at.server.server_state.connections) == 4)
        held[0].sendall(GET)
        assert held[0].recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        refused = stack.enter_context(connect(at))
        refused.sendall(GET)
        assert refused.recv(1 << 16).startswith(b"HTTP/1.1 503 ")
        waiting = [stack.enter_context(connect(at)) for _ in range(3)]
        dropped = stack.enter_context(connect(at))
        assert seconds_until_ended(waiting[-1]) < SOON
        assert seconds_until_ended(dropped) < SOON
        for raw in held:
            raw.close()
        wait_until(lambda: len(at.server.server_state.connections) < 4)
        assert httpx.get(at.url + "/health").status_code == 200


def test_room_for_connections_is_what_the_limit_of_files_leaves(monkeypatch, caplog):
    limits = {"soft": 100, "hard": 100}
    monkeypatch.setattr("ctc_drafter.serve.connections.open_files", lambda: 10)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limits["soft"], limits["hard"]))
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.update(soft=pair[0]))
    with caplog.at_level(logging.WARNING):
        most = room_for_connections(1024)
    assert most + max(1, min(64, most // 4)) + 10 + 32 <= 100, "connections, those turned away, files, spare ones"
    assert most > 40
    assert "100 files" in caplog.text
    limits |= {"soft": 256, "hard": 4096}
    assert room_for_connections(1024) == 1024
    assert limits["soft"] == 1024 + 64 + 10 + 32
    limits |= {"soft": resource.RLIM_INFINITY, "hard": resource.RLIM_INFINITY}
    assert room_for_connections(1024) == 1024
    limits |= {"soft": 42, "hard": 42}
    with pytest.raises(UserError, match="ulimit -n"):
        room_for_connections(1024)


class Full(Listener):
    """One without a free descriptor but the one that it keeps to itself."""

    full = True

    def _accept(self):
        if self.full and self.spare is not None:
            raise OSError(errno.EMFILE, "Too many open files")
        return super()._accept()


def test_a_listener_without_descriptors_drops_who_waits(caplog):
    with Full(socket.AF_INET, socket.SOCK_STREAM) as listener, ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        listener.setblocking(False)
        clients = [stack.enter_context(closing(socket.create_connection(listener.getsockname(), 5))) for _ in range(5)]
        with caplog.at_level(logging.ERROR), pytest.raises(BlockingIOError):
            listener.accept()
        assert [raw.recv(1) for raw in clients] == [b""] * 5
        with pytest.raises(BlockingIOError):
            listener.accept()
        listener.full = False
        stack.enter_context(closing(socket.create_connection(listener.getsockname(), 5)))
        listener.accept()[0].close()
    assert [record.getMessage() for record in caplog.records] == [TURNED_AWAY], "once, not for each"


FLOOD = """
import resource, socket, sys, threading, time
from ctc_drafter.serve.connections import Listener
import asyncio, logging, os
logging.basicConfig()
soft = len(os.listdir("/proc/self/fd")) + 30
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft))

class Hold(asyncio.Protocol):
    kept = []
    def connection_made(self, transport):
        self.kept.append(transport)
    def data_received(self, data):
        self.kept[-1].write(data)

async def main():
    listener = Listener(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", 0))
    server = await asyncio.get_running_loop().create_server(Hold, sock=listener, backlog=128)
    print(listener.getsockname()[1], flush=True)
    begin = time.process_time()
    await asyncio.sleep(2.0)
    print(time.process_time() - begin, len(Hold.kept), flush=True)
    for each in Hold.kept:
        each.abort()
    await asyncio.sleep(1.5)
    server.close()

asyncio.run(main())
"""


@pytest.mark.slow
def test_without_file_descriptors_connections_are_dropped_and_the_log_stays_short():
    """asyncio alone logs some megabytes in these seconds, and its retries keep the event loop busy."""
    with subprocess.Popen([sys.executable, "-c", FLOOD], stdout=-1, stderr=-1, text=True) as process, ExitStack() as at:
        port = int(process.stdout.readline())
        for _ in range(100):
            at.enter_context(closing(socket.create_connection(("127.0.0.1", port), 5)))
        busy, held = process.stdout.readline().split()
        with closing(socket.create_connection(("127.0.0.1", port), 5)) as raw:
            raw.settimeout(5)
            time.sleep(0.3)
            raw.sendall(b"still there")
            assert raw.recv(100) == b"still there", "it serves again as soon as there is room"
        log = process.stderr.read()
    assert float(busy) < 1.0
    assert 5 <= int(held) < 60
    assert log.count("no file descriptor is free") == 1
    assert "Traceback" not in log
    assert len(log) < 1000


def test_the_listener_gives_its_spare_descriptor_back():
    before = open_files()
    with bind("127.0.0.1", 0) as listener:
        assert isinstance(listener, Listener)
        listener.listen(1)
    assert open_files() == before


def test_unread_connections_end_by_the_systems_own_clock():
    with bind("127.0.0.1", 0) as listener:
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
