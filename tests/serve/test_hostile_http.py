"""Malformed and hostile HTTP: what held stays held. No 5xx, nothing beyond the page's folder, no way around the key."""

import json
import logging
import socket
from contextlib import closing

import httpx2 as httpx
import pytest

from serve_helpers import KEY, NAME, plain_texts, running, tiny_service

pytestmark = pytest.mark.slow

BODY = {"model": NAME, "prompt": [5, 9, 2], "max_tokens": 12, "temperature": 0}
HEADERS = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
CLOSE = b"Host: localhost\r\nConnection: close\r\n"


@pytest.fixture(scope="module")
def server():
    with running(tiny_service(max_body=20_000), head=3.0, keep_alive=2.0) as at:
        yield at


def answer_to(server, request: bytes) -> bytes:
    """What comes back until the server ends the connection."""
    found = b""
    with closing(socket.create_connection(("127.0.0.1", server.port), 10)) as raw:
        try:
            raw.sendall(request)
            while part := raw.recv(1 << 16):
                found += part
        except ConnectionError:
            pass
    return found


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\x00b\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\n" + CLOSE + b"\r\n",
        b"GET /%00 HTTP/1.1\r\n" + CLOSE + b"\r\n",
        b"GET /page/%ff%fe HTTP/1.1\r\n" + CLOSE + b"\r\n",
        b"GET /page/%00.js HTTP/1.1\r\n" + CLOSE + b"\r\n",
        b"GET /page/" + b"a" * 5000 + b" HTTP/1.1\r\n" + CLOSE + b"\r\n",
        b"GET http://elsewhere.example/ HTTP/1.1\r\n" + CLOSE + b"\r\n",
        b"OPTIONS * HTTP/1.1\r\n" + CLOSE + b"\r\n",
        b"CONNECT a:1 HTTP/1.1\r\n" + CLOSE + b"\r\n",
        b"GET / HTTP/1.1\r\n" + CLOSE + b"X: " + b"a" * (1 << 20) + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + CLOSE + b"".join(b"X%d: a\r\n" % i for i in range(10_000)) + b"\r\n",
        b"GET / HTTP/1.1\r\n" + CLOSE + b"Range: bytes=" + b",".join(b"%d-" % i for i in range(1500)) + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + CLOSE + b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\n" + CLOSE + b"Content-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\n" + CLOSE + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\n" + CLOSE + b"Content-Length: 99999999999999999999\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\n" + CLOSE + b"Transfer-Encoding: gzip\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\n" + CLOSE + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffffff\r\n",
        b"POST /v1/completions HTTP/1.1\r\n" + CLOSE + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n",
        b"POST /v1/completions HTTP/1.1\r\n" + CLOSE + b"Expect: the-unexpected\r\nContent-Length: 2\r\n\r\n{}",
    ],
    ids=range(27),
)
def test_malformed_http_is_no_error_of_the_server(server, request_bytes, caplog):
    assert status_of(answer_to(server, request_bytes)) < 500
    assert "Traceback" not in caplog.text
    assert not [record for record in caplog.records if record.exc_info]
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        *(
            "../server.py",
            "%2e%2e/server.py",
            "%2e%2e%2fserver.py",
            "..%2fserver.py",
            "..%5cserver.py",
            "..\\server.py",
        ),
        *("./../server.py", "....//server.py", "%252e%252e/server.py", "%c0%ae%c0%ae/server.py", "//etc/passwd"),
        *("/etc/passwd", "%2fetc%2fpasswd", "a/../../server.py", "..;/server.py", "%00../server.py", ".%2e/server.py"),
        *("..%00/server.py", "~root", "C:\\windows", "app.js/../../server.py"),
    ],
)
def test_nothing_beyond_the_pages_folder_is_read(server, path):
    request = f"GET /page/{path} HTTP/1.1\r\n".encode() + CLOSE + b"\r\n"
    answer = answer_to(server, request)
    assert status_of(answer) in (301, 302, 307, 400, 404, 405)
    assert b"uvicorn" not in answer.lower()
    assert b"root:" not in answer


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/v1/models",
            "/V1/models",
            "//v1/models",
            "/%76%31/models",
            "/v1%2fmodels",
            "/./v1/models",
            "/x/../v1/models",
        ),
        *(
            "/v1//models",
            "/v1/./models",
            "/v1/models/",
            "/v1/models?x",
            "/v1;/models",
            "/page/../v1/models",
            "/v1/ctc/stream",
        ),
    ],
)
def test_no_spelling_of_a_path_goes_around_the_key(server, path):
    answer = answer_to(server, f"GET {path} HTTP/1.1\r\n".encode() + CLOSE + b"\r\n")
    assert status_of(answer) in (401, 404, 405, 307)
    assert NAME.encode() not in answer.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_what_other_sites_may_post_without_asking_is_refused(server, kind):
    """A page of another site may send these without a preflight, and a preflight gets no leave."""
    headers = {"Authorization": f"Bearer {KEY}", "Origin": "http://evil.example"} | (
        {"Content-Type": kind} if kind else {}
    )
    reply = httpx.post(f"{server.url}/v1/completions", content=json.dumps(BODY).encode(), headers=headers)
    assert reply.status_code in (400, 415)
    assert "access-control-allow-origin" not in reply.headers
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    preflight = httpx.options(f"{server.url}/v1/completions", headers=asked)
    assert "access-control-allow-origin" not in preflight.headers


def test_labels_of_metrics_are_not_the_clients(server):
    """Else each path that somebody tries would stay in memory for ever."""
    for path in ("/secret-path-of-mine", "/v1/models/secret-path-of-mine", "/page/secret-path-of-mine"):
        httpx.get(server.url + path, headers=HEADERS)
        httpx.request("SECRET-METHOD", server.url + path, headers=HEADERS)
    text = httpx.get(f"{server.url}/metrics").text
    assert "secret" not in text.lower()


def test_no_prompt_is_in_the_log(server, caplog):
    with caplog.at_level(logging.DEBUG):
        for body in (BODY | {"prompt": "secretword"}, BODY | {"prompt": "secretword " * 400}, {"secretword": 1}):
            httpx.post(f"{server.url}/v1/completions", json=body, headers=HEADERS)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("ctc_drafter")]
    assert not any("secretword" in message for message in ours)


def test_stop_strings_are_no_patterns(server):
    (expected,) = plain_texts(server.service, BODY["prompt"], 12)
    stops = [".*", "^", "[a-z]", "(a+)+$"]
    reply = httpx.post(f"{server.url}/v1/completions", json=BODY | {"stop": stops}, headers=HEADERS)
    assert reply.json()["choices"][0]["text"] == expected


def test_the_pages_policy_lets_nothing_in_from_elsewhere(server):
    reply = httpx.get(server.url)
    policy = reply.headers.get("Content-Security-Policy", "") + reply.text
    assert "default-src 'self'" in policy or "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert "script-src 'unsafe-inline'" not in policy
