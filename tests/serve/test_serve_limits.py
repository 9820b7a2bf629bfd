"""The server when there is too much, too slow, too long, or nobody there any more."""

import json
import socket
import threading
from contextlib import closing
from itertools import pairwise

import httpx2 as httpx
import openai
import pytest

from ctc_drafter.serve.service import Service
from serve_helpers import KEY, NAME, blocked_service, plain_texts, running, text_of, tiny_service, wait_until

BODY = {"model": NAME, "prompt": [5, 9, 2], "max_tokens": 12, "temperature": 0}
HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def server():
    with running(tiny_service(max_body=20_000)) as at:
        yield at


def post(at, content=None, path="/v1/completions", **options):
    options = {"headers": HEADERS | {"Content-Type": "application/json"}, "timeout": 20, **options}
    return httpx.post(at.url + path, content=json.dumps(BODY) if content is None else content, **options)


def start(at, **changes):
    """A stream that has begun."""
    lines = at.client().completions.create(**BODY | {"stream": True} | changes)
    next(iter(lines))
    return lines


@pytest.mark.sparing(4)
@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"", 400),
        (b"[1]", 400),
        (b'"text"', 400),
        (b'{"prompt": "\xff\xfe"}', 400),
        (b'{"prompt": "\\ud800"}', 400),
        (b'{"prompt": "a", "temperature": NaN}', 400),
        (b'{"prompt": "a", "max_tokens": 1e999}', 400),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400),
        (b'{"prompt": ' + b"[" * 9000 + b"]" * 9000 + b"}", 400),
        (b'{"prompt": [1, 5000]}', 400),
        (b'{"prompt": [-1]}', 400),
        (b'{"prompt": ""}', 400),
        (b'{"prompt": [' + b"{}," * 6000 + b"{}]}", 400),
        (b'{"prompt": [' + b'"a",' * 4000 + b'"a"]}', 400),
        (b'{"prompt": "' + b"a" * 19_000 + b'"}', 400),
        (b'{"prompt": "' + b"a" * 20_000 + b'"}', 413),
    ],
)
def test_bad_bodies_are_refused_in_openais_shape(server, content, status):
    reply = post(server, content)
    assert reply.status_code == status
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert "\n" not in error["message"]


def test_a_body_without_a_length_is_counted(server):
    reply = post(server, content=(b"a" * 1000 for _ in range(40)))
    assert reply.status_code == 413
    assert "20000 bytes" in reply.json()["error"]["message"]


def test_the_way_in(server):
    assert post(server, headers={}).status_code == 401
    assert post(server, headers={"Authorization": f"Basic {KEY}"}).status_code == 401
    assert post(server, b"{", headers={"Authorization": "Bearer \xff".encode("latin-1")}).status_code == 401
    assert httpx.get(server.url + "/v1/nothing", headers=HEADERS).json()["error"]["message"]
    assert httpx.get(server.url + "/v1/completions", headers=HEADERS).status_code == 405


def test_beyond_the_queue_is_429():
    service, turnstile = blocked_service(batch_size=1, queue=1)
    with running(service) as at:
        running_one, waiting = start(at), []
        thread = threading.Thread(target=lambda: waiting.append(post(at)))
        thread.start()
        wait_until(lambda: service.engine.load().waiting == 1)
        reply = post(at)
        assert reply.status_code == 429
        assert 1 <= int(reply.headers["Retry-After"]) <= 60
        assert reply.json()["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError):
            at.client().completions.create(**BODY)
        turnstile.open()
        (expected,) = plain_texts(service, BODY["prompt"], 12)
        assert expected.endswith("".join(chunk.choices[0].text for chunk in running_one))
        thread.join()
        assert waiting[0].json()["choices"][0]["text"] == expected
        assert post(at).status_code == 200


def test_more_answers_than_ever_fit_are_no_matter_of_waiting():
    service, _ = blocked_service(batch_size=1, queue=1)
    with running(service) as at:
        assert post(at, json.dumps(BODY | {"n": 3})).status_code == 400


def test_rows_leave_when_their_client_does():
    service, turnstile = blocked_service(batch_size=2, queue=4)
    with running(service) as at:
        stream = start(at, max_tokens=400)
        with closing(socket.create_connection(("127.0.0.1", at.port))) as raw:
            body = json.dumps(BODY | {"max_tokens": 400}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
            raw.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_until(lambda: service.engine.load().waiting == 1)  # joins after the step that waits
            turnstile.open(1)
            wait_until(lambda: service.engine.load().running == 2)
        stream.close()
        tokens = service.engine.batches["draft"].stats.tokens
        wait_until(lambda: all(completion.cancelled for completion in service.engine.batches["draft"].completions))
        turnstile.open(2)
        wait_until(lambda: service.engine.load().running == 0)
        assert service.engine.batches["draft"].stats.tokens <= tokens + 4, "they were cut, not finished"


def test_a_client_that_closes_its_sending_side_has_gone():
    service, turnstile = blocked_service(batch_size=1, queue=1)
    with running(service) as at, closing(socket.create_connection(("127.0.0.1", at.port), 20)) as raw:
        body = json.dumps(BODY | {"max_tokens": 400}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
        raw.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: service.engine.load().running == 1)
        raw.shutdown(socket.SHUT_WR)
        wait_until(lambda: all(completion.cancelled for completion in service.engine.batches["draft"].completions))
        turnstile.open(2)
        wait_until(lambda: service.engine.load().running == 0)
        assert raw.recv(1 << 16) == b""


def test_answers_that_take_too_long_end():
    service, turnstile = blocked_service(timeout=0.3)
    with running(service) as at, turnstile.dripping(0.05):
        with pytest.raises(openai.APIError, match="longer than the server allows"):
            list(start(at, max_tokens=400))
        reply = post(at, json.dumps(BODY | {"max_tokens": 400}))
        assert reply.status_code == 504
        assert reply.json()["error"]["code"] == "timeout"


def test_shutdown_lets_answers_finish_and_turns_others_away():
    service, turnstile = blocked_service(grace=20)
    with running(service) as at:
        stream, waiting = start(at), []
        thread = threading.Thread(target=lambda: waiting.append(post(at)))
        thread.start()
        wait_until(lambda: service.engine.load().waiting == 1)
        at.server.should_exit = True
        wait_until(lambda: not service.engine.load().open)
        turnstile.open()
        text = "".join(chunk.choices[0].text for chunk in stream)
        thread.join()
    assert text
    assert plain_texts(service, BODY["prompt"], 12)[0].endswith(text)
    assert waiting[0].status_code == 503


def test_shutdown_ends_streams_properly_when_there_is_no_time():
    service, turnstile = blocked_service(grace=0)
    with running(service) as at:
        stream = start(at, max_tokens=400)
        at.server.should_exit = True
        wait_until(lambda: not service.engine.load().open)
        turnstile.open(1)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)


def test_a_failing_step_fails_its_answers_and_no_others(caplog):
    service, turnstile = blocked_service()
    step, batch = service.engine.batches["draft"].step, service.engine.batches["draft"]
    with running(service) as at:
        turnstile.open()
        batch.step = lambda: 1 // 0
        assert post(at).status_code == 500
        batch.step = step
        assert post(at).json()["choices"][0]["text"] == plain_texts(service, BODY["prompt"], 12)[0]
    assert "ZeroDivisionError" in caplog.text


def test_a_batch_that_cannot_let_a_row_go_fails_and_the_server_goes_on(caplog):
    service, turnstile = blocked_service()
    batch = service.engine.batches["draft"]
    with running(service) as at:
        turnstile.open()
        drop, batch.drop = batch.drop, lambda: 1 // 0
        assert post(at).status_code == 500
        batch.drop = drop
        assert post(at).json()["choices"][0]["text"] == plain_texts(service, BODY["prompt"], 12)[0]
    assert "ZeroDivisionError" in caplog.text


def test_jobs_that_are_being_prefilled_count_and_may_be_turned_away(monkeypatch):
    """Of two that join together the second one waits for the first one's prefill, and hears of a shutdown."""
    service, turnstile = blocked_service(batch_size=2, queue=2, grace=20)
    batch, prefills, go = service.engine.batches["draft"], [], threading.Event()
    admit = batch.admit

    def slow(completion):
        prefills.append(completion)
        assert go.wait(60)
        admit(completion)

    monkeypatch.setattr(batch, "admit", slow)
    with running(service) as at:
        replies, threads = [], []
        turnstile.open()
        for content in (json.dumps(BODY | {"n": 2}), json.dumps(BODY)):
            threads.append(threading.Thread(target=lambda text=content: replies.append(post(at, text).status_code)))
            threads[-1].start()
            wait_until(lambda: prefills)
        wait_until(lambda: service.engine.load().waiting == 1)
        assert service.engine.load().running == 2
        at.server.should_exit = True
        wait_until(lambda: not service.engine.load().open)
        go.set()
        for thread in threads:
            thread.join()
    assert len(prefills) == 1
    assert replies == [503, 503]


def test_what_fails_unexpectedly_is_counted_as_our_fault(monkeypatch):
    service = tiny_service()

    def broken(*_):
        raise TypeError("not foreseen")

    monkeypatch.setattr(Service, "check_prompt", broken)
    with running(service) as at:
        assert post(at).status_code == 500
        line = 'ctc_drafter_requests_total{path="/v1/completions",status="500"} 1.0'
        wait_until(lambda: line in httpx.get(f"{at.url}/metrics").text)  # it is counted behind its answer


@pytest.mark.slow
def test_a_slow_reader_keeps_nobody_waiting(server):
    body = json.dumps(BODY | {"max_tokens": 400, "stream": True, "logprobs": 5}).encode()
    with closing(socket.socket()) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", server.port))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
        raw.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: server.service.engine.load().running == 1)
        assert post(server).status_code == 200
        wait_until(lambda: server.service.engine.load().running == 0)


def test_a_request_that_never_comes_is_dropped():
    service = tiny_service(timeout=0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctc_drafter.serve.server.SLACK", 0.2)
        with running(service) as at, closing(socket.create_connection(("127.0.0.1", at.port), 10)) as raw:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
            raw.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{{".encode())
            assert b" 408 " in raw.recv(4096)


def test_our_own_stream_shows_bursts_and_trees(server):
    service = server.service
    request = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 24, "seed": 7, "temperature": 0.8}
    ids = service.tokenizer.apply_chat_template(request["messages"], add_generation_prompt=True, return_dict=False)
    (expected,) = plain_texts(service, list(ids), 24, seed=7, temperature=0.8)
    for plain in (False, True):
        reply = post(server, json.dumps(request | {"plain": plain}), "/v1/ctc/stream")
        events = [
            dict(line.split(": ", 1) for line in block.split("\n")) for block in reply.text.split("\n\n") if block
        ]
        *steps, end = [json.loads(event["data"]) for event in events]
        assert [event["event"] for event in events] == ["step"] * len(steps) + ["end"]
        pieces = [piece for step in steps for piece in step["pieces"]]
        assert "".join(piece["text"] for piece in pieces) + end["tail"] == expected
        assert text_of(service, [piece["token"] for piece in pieces]) == expected
        assert end["verifications"] == len(steps) - 1
        assert end["beta"] == pytest.approx((len(pieces) - 1) / (len(steps) - 1))
        assert steps[0]["tree"] == []
        for before, step in pairwise(steps):
            tree = step["tree"]
            assert (len(tree) == 1) == plain
            assert tree[0]["token"] == before["pieces"][-1]["token"], "the root is the newest token"
            path = [node["token"] for node in tree[1:] if node["accepted"]]
            assert path[: step["accepted"]] == [piece["token"] for piece in step["pieces"]][: step["accepted"]]
            assert all(tree[node["parent"]]["depth"] == node["depth"] - 1 for node in tree[1:])
            assert all(node["probability"] <= tree[node["parent"]]["probability"] + 1e-6 for node in tree)


def test_the_page_is_there(server):
    page = httpx.get(server.url + "/")
    assert page.headers["content-type"].startswith("text/html")
    for name in ("app.js", "answer.js", "dom.js", "stream.js", "tree.js"):
        assert "javascript" in httpx.get(f"{server.url}/page/{name}").headers["content-type"]
    assert httpx.get(server.url + "/page/style.css").status_code == 200
    assert httpx.get(server.url + "/page/%2e%2e/app.py").status_code == 404


def test_half_an_emoji_in_a_name_is_an_unknown_model():
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    body = rb'{"prompt": "a", "model": "\ud800"}'
    with running(tiny_service()) as server:
        reply = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers)
    assert reply.status_code == 404
    assert "there is no model ?" in reply.json()["error"]["message"]
