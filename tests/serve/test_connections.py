"""Connections that send nothing, too much, or read nothing."""

import asyncio
import json
import socket
import threading
import time
from contextlib import closing

import httpx2 as httpx
import pytest

from ctc_drafter.serve.connections import (
    hosts_of,
)
from serve_helpers import KEY, NAME, plain_texts, running, tiny_service, wait_until

pytestmark = pytest.mark.slow

BODY = {"model": NAME, "prompt": [5, 9, 2], "max_tokens": 12, "temperature": 0}
HEADERS = {"Authorization": f"Bearer {KEY}"}
HEAD = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
JSON = "Content-Type: application/json\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def server():
    """Deadlines of parts of a second."""
    seconds = {"head": 0.4, "request": 1.0, "flush": 0.4, "linger": 0.4}
    with running(tiny_service(max_body=20_000), hosts=hosts_of("127.0.0.1", ["llm.example"]), **seconds) as at:
        yield at


def connect(server, buffer=0):
    raw = socket.socket()
    raw.settimeout(5)
    if buffer:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    raw.connect(("127.0.0.1", server.port))
    return closing(raw)


SOON = 20.0  # seconds; a quiet machine needs less than one, and without an end it would be `most`


def read_all(raw):
    """All bytes until the other side ends."""
    found = b""
    while True:
        try:
            part = raw.recv(1 << 16)
        except ConnectionError:
            return found
        if not part:
            return found
        found += part


def seconds_until_ended(raw, send=b"", every=0.02, begin=None, most=30.0):
    """How long a connection lives that goes on sending; counted from `begin`, which is now unless told."""
    begin = time.monotonic() if begin is None else begin
    raw.setblocking(False)
    while time.monotonic() - begin < most:
        try:
            if send:
                raw.send(send)
        except BlockingIOError:
            pass
        except OSError:
            return time.monotonic() - begin
        try:
            if raw.recv(1 << 16) == b"":
                return time.monotonic() - begin
        except BlockingIOError:
            time.sleep(every)
        except OSError:
            return time.monotonic() - begin
    return most


# Time.


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n", GET + b"GET /hea"])
def test_a_head_that_does_not_come_ends_the_connection(server, sent):
    begin = time.monotonic()
    with connect(server) as raw:
        raw.sendall(sent)
        assert 0.3 < seconds_until_ended(raw, begin=begin) < SOON


def test_a_head_that_drips_ends_with_its_deadline(server):
    begin = time.monotonic()
    with connect(server) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nX-Slow: ")
        assert 0.3 < seconds_until_ended(raw, b"a", begin=begin) < SOON


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n", 401),  # no key
        (HEAD.replace("POST /v1/completions", "POST /health"), 405),
        (HEAD.replace("/v1/completions", "/nowhere"), 404),
        (HEAD.replace("localhost", "evil.example"), 403),
    ],
)
def test_what_is_sent_behind_a_refusal_is_not_listened_to(server, head, status):
    """It went on for hundreds of megabytes, each chunk of which was parsed."""
    with connect(server) as raw:
        raw.sendall(f"{head}{JSON}Transfer-Encoding: chunked\r\n\r\n1\r\n[\r\n".encode())
        wait_until(lambda: select_read(raw))
        answer = raw.recv(1 << 16)
        assert answer.startswith(f"HTTP/1.1 {status} ".encode()), "it was told before the connection ends"
        assert seconds_until_ended(raw, b"400\r\n" + b"a" * 0x400 + b"\r\n", 0) < SOON


def select_read(raw):
    try:
        return bool(raw.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return False


def test_a_client_that_is_refused_while_it_sends_reads_the_answer(server):
    """A socket closed with unread data is reset, and the answer lost: the rest is taken and thrown away for a while."""
    with connect(server) as raw:
        raw.sendall(f"{HEAD}{JSON}Content-Length: 400000\r\n\r\n".encode())
        for _ in range(100):
            raw.sendall(b"a" * 4000)
            time.sleep(0.001)
        answer = read_all(raw)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in head.lower()
    assert "20000 bytes" in json.loads(body)["error"]["message"]


def test_a_body_that_goes_on_behind_its_408_ends():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctc_drafter.serve.server.SLACK", 0.2)
        with running(tiny_service(timeout=0.2), linger=0.4) as at, connect(at) as raw:
            raw.sendall(f"{HEAD}{JSON}Content-Length: 100\r\n\r\n{{".encode())
            assert b" 408 " in raw.recv(1 << 16)
            assert seconds_until_ended(raw, b" ", 0.1) < SOON


def test_an_answer_that_nobody_takes_is_dropped(server):
    """The sockets' buffers take some of 40 answers of many kB each; the rest waited for ever."""
    (listening,) = server.server.servers[0].sockets
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # accepted ones inherit it
    with connect(server, buffer=4096) as raw:
        raw.sendall(b"GET /page/style.css HTTP/1.1\r\nHost: localhost\r\n\r\n" * 40)
        wait_until(lambda: server.server.server_state.connections)
        wait_until(lambda: not server.server.server_state.connections)


def test_a_connection_is_kept_for_the_next_request(server):
    with connect(server) as raw:
        for _ in range(3):
            raw.sendall(GET)
            answer = b""
            while not answer.endswith(b"}"):
                answer += raw.recv(1 << 16)
            assert answer.startswith(b"HTTP/1.1 200 ")
            time.sleep(0.5)  # longer than a head may take: no head has begun


# Size.


def test_many_tiny_chunks_are_refused(server):
    """One byte a chunk costs the event loop many times what the byte does."""
    with connect(server) as raw:
        raw.sendall(f"{HEAD}{JSON}Transfer-Encoding: chunked\r\n\r\n".encode())
        raw.sendall(b"1\r\n \r\n" * 5000)
        answer = read_all(raw)
    assert answer.startswith(b"HTTP/1.1 400 ")


def test_a_body_in_some_chunks_is_answered(server):
    text = json.dumps(BODY)
    chunks = "".join(f"1\r\n{letter}\r\n" for letter in text) + "0\r\n\r\n"
    with connect(server) as raw:
        raw.sendall(f"{HEAD}{JSON}Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}".encode())
        answer = read_all(raw)
    (expected,) = plain_texts(server.service, BODY["prompt"], 12)
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["text"] == expected


def test_a_bad_chunk_behind_an_answer_writes_nothing_to_the_log(server, caplog):
    with connect(server) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
        read_all(raw)
    with connect(server) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        wait_until(lambda: select_read(raw))
        raw.sendall(b"zz\r\n")
        read_all(raw)
    with connect(server) as raw:
        raw.sendall(f"{HEAD}{JSON}Transfer-Encoding: chunked\r\n\r\n".encode() + b"5000\r\n" + b"a" * 0x5000 + b"\r\n")
        wait_until(lambda: select_read(raw))
        raw.sendall(b"zz\r\n")
        assert read_all(raw).startswith(b"HTTP/1.1 413 ")
    assert "Traceback" not in caplog.text
    assert not [record for record in caplog.records if record.exc_info]


def test_both_lengths_in_one_head_are_refused(server):
    """RFC 9112: a request smuggled behind the shorter one must not be answered."""
    with connect(server) as raw:
        smuggled = f"{HEAD}{JSON}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode()
        raw.sendall(smuggled + GET)
        answer = read_all(raw)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1


def test_long_prompts_are_refused_before_they_are_tokenised(monkeypatch):
    service = tiny_service()
    limit = (service.target.context - 1) * service.longest_token
    tokenised = []
    real = type(service.tokenizer).__call__

    def counting(self, text, *args, **options):
        tokenised.append(len(text) if isinstance(text, str) else 0)
        return real(self, text, *args, **options)

    monkeypatch.setattr(type(service.tokenizer), "__call__", counting)
    with running(service, None) as at:
        for path, body in (
            ("/v1/completions", {"prompt": "a" * (limit + 1)}),
            ("/v1/completions", {"prompt": ["a", "a" * (limit + 1)]}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * limit}] * 2}),
            ("/v1/ctc/stream", {"messages": [{"role": "user", "content": "a" * (limit + 1)}]}),
        ):
            reply = httpx.post(at.url + path, json={"model": NAME, **body})
            assert reply.status_code == 400, path
            assert reply.json()["error"]["code"] == "context_length_exceeded"
            assert f"may have {service.target.context - 1} tokens" in reply.json()["error"]["message"]
    assert max(tokenised, default=0) <= limit


def test_no_more_than_two_prompts_are_tokenised_at_a_time():
    service, inside, most, lock = tiny_service(), [0], [0], threading.Lock()

    def encode(number):
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        with lock:
            inside[0] -= 1
        return number

    async def all_of_them():
        return await asyncio.gather(*(service.encoded(encode, number) for number in range(12)))

    assert asyncio.run(all_of_them()) == list(range(12))
    assert most == [2]


def test_the_longest_text_that_fits_is_not_refused():
    """The bound is no guess: a prompt of as many of the longest tokens as fit is answered."""
    service = tiny_service()
    ids = service.tokenizer.get_vocab()
    longest = max((token for token in ids if token.isalpha()), key=len)
    text = service.tokenizer.decode([ids[longest]]) * (service.target.context - 1)
    assert len(service.tokenizer(text).input_ids) == service.target.context - 1
    assert len(service.encode_text(text)) == service.target.context - 1
