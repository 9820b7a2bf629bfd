"""Every field of every request with values that no client should send: no error of the server, and one shape."""

import json

import httpx2 as httpx
import pytest

from ctc_drafter.serve.protocol import ChatRequest, CompletionRequest, TraceRequest
from ctc_drafter.serve.responses_api import ResponsesRequest
from serve_helpers import KEY, plain_texts, running, tiny_service

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

HEADERS = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
ASK = [{"role": "user", "content": "the cat"}]
REQUESTS = {
    "chat/completions": (ChatRequest, {"messages": ASK, "max_tokens": 2, "temperature": 0}),
    "completions": (CompletionRequest, {"prompt": "the cat", "max_tokens": 2, "temperature": 0}),
    "responses": (ResponsesRequest, {"input": "the cat", "max_output_tokens": 2, "temperature": 0}),
    "ctc/stream": (TraceRequest, {"messages": ASK, "max_tokens": 2, "temperature": 0}),
}
# As JSON texts: some of them are none that Python would write.
VALUES = [
    *("null", "true", "false", "0", "1", "-1", "1.5", "-0.0", "1e-300", "1e308", "1e999", "NaN", "Infinity"),
    *("9223372036854775807", "9223372036854775808", "-9223372036854775809", "9" * 400),
    *('""', '"a"', '"\\u0000"', '"\\ud800"', '"' + "a" * 5000 + '"', '"${jndi:ldap://x}"', '"\\u202e\\ufeff"'),
    *("[]", "[[]]", "[null]", '[""]', '["a", 1]', "[1, 2]", "[-1]", "[1e3]", "[[1], [2]]", "[{}]"),
    *("{}", '{"a": 1}', '{"": null}', '{"type": "function"}', '{"5": 1}', '{"5": 1e999}', '{"-1": 1}', '{"9999": 1}'),
    *("[" * 60 + "]" * 60, '{"a": ' * 60 + "1" + "}" * 60, "[" + "1," * 2000 + "1]"),
]


@pytest.fixture(scope="module")
def server():
    with running(tiny_service(max_new_tokens=2)) as at:
        yield at


@pytest.mark.parametrize("path", REQUESTS)
def test_no_value_of_a_field_is_an_error_of_the_server(server, path, caplog):
    model, good = REQUESTS[path]
    names = sorted({*model.model_fields, *model.asks_nothing})
    assert len(names) > 15
    statuses = set()
    with httpx.Client(base_url=f"{server.url}/v1/", headers=HEADERS, timeout=120) as client:
        for name in names:
            rest = json.dumps({key: value for key, value in good.items() if key != name})[1:-1]
            for value in VALUES if name in model.model_fields else VALUES[::6]:
                body = f"{{{rest}{',' if rest else ''} {json.dumps(name)}: {value}}}"
                reply = client.post(path, content=body.encode())
                statuses.add(reply.status_code)
                assert reply.status_code in (200, 400, 404), (body[:200], reply.text[:300])
                if reply.status_code != 200:
                    error = reply.json()["error"]
                    assert error.keys() == {"message", "type", "param", "code"}
                    assert error["type"] == "invalid_request_error"
                    assert error["message"], body[:200]
                    assert "\n" not in error["message"], body[:200]
                    assert len(error["message"]) < 700
    assert statuses >= {200, 400}
    assert not [record for record in caplog.records if record.exc_info]


def test_it_answers_as_before(server):
    (expected,) = plain_texts(server.service, [5, 9, 2], 2)
    body = {"prompt": [5, 9, 2], "max_tokens": 2, "temperature": 0}
    reply = httpx.post(f"{server.url}/v1/completions", json=body, headers=HEADERS, timeout=60)
    assert reply.json()["choices"][0]["text"] == expected
