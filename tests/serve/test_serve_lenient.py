"""`serve --lenient`: unknown fields of requests are left out and counted, at every depth; else they are refused."""

import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import pytest

from serve_helpers import KEY, NAME, running, tiny_service, wait_until

HEADERS = {"Authorization": f"Bearer {KEY}"}
ASK = [{"role": "user", "content": "the cat"}]
CHAT = {"messages": ASK, "max_tokens": 6, "temperature": 0}
TEXT = {"prompt": "the cat", "max_tokens": 6, "temperature": 0}
RESPONSE = {"input": "the cat", "max_output_tokens": 6, "temperature": 0}
SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
# Requests with unknown fields, how many, and the same request without them.
UNKNOWN = [
    ("chat/completions", CHAT | {"wings": 2, "dry_multiplier": 0.5}, 2, CHAT),
    ("chat/completions", CHAT | {"messages": [ASK[0] | {"mood": "glad"}]}, 1, CHAT),
    (
        "chat/completions",
        CHAT | {"messages": [{"role": "user", "content": [{"type": "text", "text": "the cat", "cache_control": {}}]}]},
        1,
        CHAT,
    ),
    ("chat/completions", CHAT | {"response_format": SCHEMA | {"a": 1}}, 1, CHAT | {"response_format": SCHEMA}),
    (
        "chat/completions",
        CHAT | {"response_format": {**SCHEMA, "json_schema": SCHEMA["json_schema"] | {"b": 1}}, "c": None},
        1,
        CHAT | {"response_format": SCHEMA},
    ),
    ("completions", TEXT | {"wings": None, "t_max_predict_ms": 9}, 1, TEXT),
    ("completions", TEXT | {"stream": True, "stream_options": {"more": True}}, 1, TEXT | {"stream": True}),
    ("responses", RESPONSE | {"input": [ASK[0] | {"mood": "glad"}], "wings": {}}, 2, RESPONSE),
    ("ctc/stream", CHAT | {"wings": 2}, 1, CHAT),
]


@pytest.fixture(scope="module")
def lenient():
    with running(tiny_service(lenient=True)) as at:
        yield at


@pytest.fixture(scope="module")
def strict():
    with running(tiny_service()) as at:
        yield at


def post(server, path, body):
    return httpx.post(f"{server.url}/v1/{path}", json=body, headers=HEADERS, timeout=60)


def texts(reply: httpx.Response) -> list[str]:
    """All texts of an answer or a stream, in order."""
    assert reply.status_code == 200, reply.text
    return re.findall(r'"(?:text|content|delta)":("(?:[^"\\]|\\.)*")', reply.text)


def ignored(server) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    return float(re.search(r"^ctc_drafter_ignored_fields_total (\S+)$", text, re.MULTILINE)[1])


@pytest.mark.sparing(3)
@pytest.mark.parametrize(("path", "body", "count", "without"), UNKNOWN)
def test_unknown_fields_change_nothing_and_are_counted(lenient, strict, path, body, count, without):
    before = ignored(lenient)
    found = texts(post(lenient, path, body))
    assert found == texts(post(lenient, path, without))
    assert found
    wait_until(lambda: ignored(lenient) == before + count)
    refused = post(strict, path, body)
    assert refused.status_code == 400
    assert "unknown field" in refused.json()["error"]["message"]
    assert ignored(strict) == 0


@pytest.mark.parametrize("fields", [{"best_of": 3}, {"suffix": "a"}, {"echo": True}, {"use_beam_search": True}])
def test_fields_that_would_change_the_answer_are_refused_all_the_same(lenient, fields):
    reply = post(lenient, "completions", TEXT | fields)
    assert reply.status_code == 400
    assert f"{next(iter(fields))} is not supported" in reply.json()["error"]["message"]


def test_wrong_values_of_known_fields_are_refused_all_the_same(lenient):
    for fields in ({"n": 0}, {"temperature": "hot"}, {"stop": 7}):
        assert post(lenient, "completions", TEXT | {"wings": 2} | fields).status_code == 400


def test_requests_at_once_count_their_own(lenient):
    before = ignored(lenient)
    with ThreadPoolExecutor(8) as pool:
        bodies = [TEXT | {f"wings{place}": 1 for place in range(number % 3)} for number in range(24)]
        assert {reply.status_code for reply in pool.map(lambda body: post(lenient, "completions", body), bodies)} <= {
            200,
            429,
        }
    wait_until(lambda: ignored(lenient) == before + 24)


def test_the_log_names_them_as_far_as_they_are_names(lenient, caplog):
    odd = {"wings": 1, "secret words\nforged": 1, "a" * 50: 1, "ключ": 1}
    with caplog.at_level(logging.INFO, "ctc_drafter.serve"):
        assert post(lenient, "completions", TEXT | {"model": NAME} | odd).status_code == 200
        wait_until(lambda: any("ignored" in record.message for record in caplog.records))
    (line,) = (record for record in caplog.records if "ignored" in record.message)
    assert line.getMessage().endswith(", fields ignored: ?, ?, wings, ?")
    assert line.fields["ignored"] == ["?", "?", "wings", "?"]
    many = TEXT | {f"field{place:03}": 1 for place in range(500)}
    caplog.clear()
    with caplog.at_level(logging.INFO, "ctc_drafter.serve"):
        assert post(lenient, "completions", many).status_code == 200
        wait_until(lambda: any("ignored" in record.message for record in caplog.records))
    assert len(caplog.records[-1].getMessage()) < 250
    assert json.dumps(caplog.records[-1].fields)
