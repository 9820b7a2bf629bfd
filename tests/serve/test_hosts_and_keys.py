"""Names that the server is not called by, and keys that no client can send: Host headers, rebinding, odd keys."""

import hmac
import socket
from contextlib import closing

import httpx2 as httpx
import pytest

from ctc_drafter.cli import main
from ctc_drafter.serve.connections import (
    host_name,
    hosts_of,
    is_loopback,
)
from ctc_drafter.serve.middleware import check_key
from ctc_drafter.types import UserError
from serve_helpers import KEY, NAME, running, tiny_service

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


# Names.


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:{port}", 200),
        ("localhost:{port}", 200),
        ("LOCALHOST", 200),
        ("localhost.", 200),
        ("[::1]:{port}", 200),
        ("llm.example", 200),
        ("evil.example:{port}", 403),
        ("localhost.evil.example", 403),
        ("localhost@evil.example", 403),
        ("[::2]", 403),
        ("", 403),
    ],
)
def test_pages_whose_name_was_rebound_to_this_machine_are_refused(server, host, status):
    lines = f"Host: {host.format(port=server.port)}\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n\r\n"
    for path in ("/health", "/v1/models", "/metrics", "/"):
        with connect(server) as raw:
            raw.sendall(f"GET {path} HTTP/1.1\r\n{lines}".encode())
            answer = read_all(raw)
        assert answer.startswith(f"HTTP/1.1 {status} ".encode()), path
        assert (b"--allowed-host" in answer) == (status == 403)


@pytest.mark.parametrize(
    ("host", "allowed", "names"),
    [
        ("127.0.0.1", [], {"localhost", "127.0.0.1", "::1"}),
        ("127.0.0.2", [], {"localhost", "127.0.0.1", "::1", "127.0.0.2"}),
        ("::1", ["Me.Example"], {"localhost", "127.0.0.1", "::1", "me.example"}),
        ("0.0.0.0", [], None),
        ("0.0.0.0", ["llm.example", "::2"], {"llm.example", "::2"}),
        ("localhost", ["*"], None),
    ],
)
def test_the_names_that_are_allowed(host, allowed, names):
    assert hosts_of(host, allowed) == names


@pytest.mark.parametrize("name", ["http://a", "a/b", "", "a b", "a:b:c:zz"])
def test_what_is_no_host_name_is_refused(name):
    with pytest.raises(UserError, match="--allowed-host"):
        hosts_of("127.0.0.1", [name])


def test_parts_of_a_host_header():
    assert [host_name(text) for text in ("A.b:80", "[::1]:80", "[::1]", "a", "a:", "a:b", "a]", "[a")] == [
        *("a.b", "::1", "::1", "a", "a", "", "", "")
    ]
    assert [is_loopback(host) for host in ("127.9.9.9", "::1", "localhost", "0.0.0.0", "::", "example.com")] == [
        *(True, True, True, False, False, False)
    ]


def test_answers_cannot_be_framed_nor_taken_for_another_kind(server):
    for path in ("/", "/health", "/page/app.js", "/v1/models", "/nowhere"):
        reply = httpx.get(server.url + path)
        assert reply.headers["X-Content-Type-Options"] == "nosniff", path
        assert reply.headers["X-Frame-Options"] == "DENY", path


def test_redirects_do_not_repeat_the_name_they_were_asked_by(server):
    reply = httpx.get(server.url + "/page", headers={"Host": "llm.example"}, follow_redirects=False)
    if reply.is_redirect:
        assert reply.headers["Location"].startswith("/page")
        assert "llm.example" not in reply.headers["Location"]


def test_errors_do_not_echo_long_names(server):
    name = "a" * 15_000
    reply = httpx.post(server.url + "/v1/completions", json=BODY | {"model": name}, headers=HEADERS)
    assert reply.status_code == 404
    assert len(reply.content) < 2000
    reply = httpx.post(server.url + "/v1/completions", json=BODY | {name: 1}, headers=HEADERS)
    assert reply.status_code == 400
    assert len(reply.content) < 3000


# Keys.


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer "])
def test_the_scheme_of_a_key_may_be_in_any_case(server, scheme):
    assert httpx.get(server.url + "/v1/models", headers={"Authorization": f"{scheme} {KEY}"}).status_code == 200


@pytest.mark.parametrize("given", ["", "Bearer", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer{KEY}", KEY])
def test_other_keys_are_refused(server, given):
    assert httpx.get(server.url + "/v1/models", headers={"Authorization": given}).status_code == 401


@pytest.mark.parametrize("path", ["/health", "/metrics", "/openapi.json", "/version", "/"])
def test_what_needs_no_key(server, path):
    assert httpx.get(server.url + path, timeout=60).status_code == 200


def test_keys_are_compared_in_constant_time(server, monkeypatch):
    asked = []
    real = hmac.compare_digest
    monkeypatch.setattr(
        "ctc_drafter.serve.middleware.hmac.compare_digest", lambda *both: asked.append(both) or real(*both)
    )
    assert (
        httpx.get(server.url + "/v1/models", headers={"Authorization": "Bearer guess"}, timeout=60).status_code == 401
    )
    assert asked == [(b"guess", KEY.encode())]


@pytest.mark.parametrize("key", ["", " ", "a b", "a\n", " a", "ключ", "\udcff", "a\x7f"])
def test_keys_that_no_client_can_send_are_refused(key):
    with pytest.raises(UserError, match="no client can send"):
        check_key(key)


def test_usual_keys_are_taken():
    check_key(None)
    check_key("sk-Ab_9.~+/==")


@pytest.mark.parametrize("key", ["", "two words", "line\n"])
def test_an_empty_or_odd_key_in_the_environment_is_refused(key, monkeypatch, capsys):
    """A compose file with an unset variable gives an empty one, and must not open the server to all."""
    monkeypatch.setenv("CTC_DRAFTER_API_KEY", key)
    assert main(["serve", "--port", "0"]) == 2
    message = capsys.readouterr().err
    assert "no client can send" in message
    assert message.count("\n") == 1


def test_an_allowed_host_that_is_none_is_refused_before_anything_is_loaded(capsys):
    assert main(["serve", "--port", "0", "--allowed-host", "http://llm.example"]) == 2
    assert "--allowed-host" in capsys.readouterr().err
