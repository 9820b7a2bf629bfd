"""A server as a process: signals while streams are open or a client never reads, and memory after aborted requests."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from contextlib import closing, contextmanager

import httpx2 as httpx
import psutil
import pytest

from benchmarks.server_process import started
from tiny_models import save_pair

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LONG = {"prompt": [5, 9, 30], "max_tokens": 400, "temperature": 0, "stream": True}
SHORT = {"prompt": [5, 9, 30], "max_tokens": 8, "temperature": 0}
GROWTH = 24 << 20  # bytes that allocators may keep after the warm-up
ABORTED = int(os.environ.get("ABORTED", "300"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pair")
    save_pair(path)
    return path


@contextmanager
def served(folder, *options, port=0):
    command = [
        sys.executable,
        "-m",
        "ctc_drafter.cli",
        "serve",
        "--target",
        str(folder / "target"),
        "--port",
        str(port),
    ]
    command += ["--drafter", str(folder / "drafter"), "--threads", "1", "--batch-size", "2", *options]
    with started(command) as (process, url):
        try:
            yield process, url
        finally:
            process.kill()


def last_lines(reply) -> list[str]:
    try:
        return [line for line in reply.iter_lines() if line.startswith("data: ")]
    except httpx.HTTPError:
        return ["cut"]


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_streams_properly(folder, number, twice):
    with served(folder, "--grace", "0") as (process, url):
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as reply:
            process.send_signal(number)
            if twice:
                time.sleep(0.05)
                process.send_signal(number)
            lines = last_lines(reply)
        assert process.wait(30) == (-signal.SIGTERM if number == signal.SIGTERM else 0)
    assert twice or lines[-1] == "data: [DONE]" or "error" in json.loads(lines[-1][6:]), lines[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stream_has_its_grace(folder, number):
    with served(folder, "--grace", "600") as (process, url):
        expected = httpx.post(f"{url}/v1/completions", json=LONG | {"stream": False}, timeout=600).json()
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=600) as reply:
            process.send_signal(number)
            *lines, last = last_lines(reply)
        assert process.wait(60) == (-signal.SIGTERM if number == signal.SIGTERM else 0)
    assert last == "data: [DONE]"
    text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines)
    assert text == expected["choices"][0]["text"]


def test_a_client_that_never_reads_holds_nobody_up(folder):
    with served(folder, "--grace", "1") as (process, url):
        host, port = url.removeprefix("http://").split(":")
        with closing(socket.create_connection((host, int(port)), 5)) as raw:
            body = json.dumps(LONG).encode()
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            raw.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == -signal.SIGTERM  # grace + 5 s, and what a busy machine adds


def test_a_server_that_was_stopped_goes_on(folder):
    with served(folder) as (process, url):
        expected = httpx.post(f"{url}/v1/completions", json=SHORT, timeout=60).json()["choices"][0]["text"]
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as reply:
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.5)
            process.send_signal(signal.SIGCONT)
            lines = last_lines(reply)
        assert lines[-1] == "data: [DONE]"
        text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1])
        assert text.startswith(expected)
        assert httpx.post(f"{url}/v1/completions", json=SHORT, timeout=60).json()["choices"][0]["text"] == expected


def test_killed_and_started_again(folder):
    """On the same port."""
    with served(folder) as (process, url):
        expected = httpx.post(f"{url}/v1/completions", json=SHORT, timeout=60).json()["choices"][0]["text"]
        port = int(url.rsplit(":", 1)[1])
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(signal.SIGKILL)
            with pytest.raises(httpx.HTTPError):
                list(lines)
    with served(folder, port=port) as (process, url):
        reply = httpx.post(f"{url}/v1/completions", json=SHORT, timeout=60)
        assert reply.json()["choices"][0]["text"] == expected
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == -signal.SIGTERM


def abort(url, count: int) -> None:
    """Requests whose clients leave after the first piece, or before it."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(LONG).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for number in range(count):
        with closing(socket.create_connection((host, int(port)), 30)) as raw:
            raw.sendall(head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            if number % 2:
                raw.recv(100)


def wait_idle(url) -> None:
    end = time.monotonic() + 30
    while True:
        health = httpx.get(f"{url}/health", timeout=30).json()
        if health["running"] == health["waiting"] == 0:
            return
        assert time.monotonic() < end, "rows are left behind"
        time.sleep(0.05)


def test_aborted_requests_leave_nothing(folder):
    with served(folder, "--queue", "8") as (process, url):
        watched = psutil.Process(process.pid)
        abort(url, ABORTED // 3)
        wait_idle(url)
        before, files = watched.memory_info().rss, watched.num_fds()
        abort(url, ABORTED)
        wait_idle(url)
        assert watched.memory_info().rss - before < GROWTH
        assert abs(watched.num_fds() - files) <= 2
        reply = httpx.post(f"{url}/v1/completions", json=SHORT, timeout=60)
        assert reply.json()["usage"]["completion_tokens"] == 8
