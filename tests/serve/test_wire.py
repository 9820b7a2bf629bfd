"""The JSON of answers: that of a snapshot, in which ids and times are masked, less the nulls that say nothing."""

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from serve_helpers import KEY, NAME, running, tiny_service

SNAPSHOT = Path(__file__).parent / "wire.json"
CHAT = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 6, "temperature": 0}
TEXT = {"prompt": "the cat", "max_tokens": 6, "temperature": 0}
SEVERAL = {"n": 2, "temperature": 0.9, "seed": 3, "max_tokens": 4}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
REQUESTS = {
    "chat": ("chat/completions", CHAT),
    "chat, logprobs": ("chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2}),
    "chat, n": ("chat/completions", CHAT | SEVERAL),
    "chat, stream": ("chat/completions", CHAT | {"stream": True}),
    "chat, stream, usage, logprobs": ("chat/completions", CHAT | USAGE | {"logprobs": True, "top_logprobs": 1}),
    "chat, refused": ("chat/completions", CHAT | {"n": 0}),
    "chat, another model": ("chat/completions", CHAT | {"model": "other"}),
    "completion": ("completions", TEXT),
    "completion, ids": ("completions", TEXT | {"return_token_ids": True}),
    "completion, logprobs": ("completions", TEXT | {"logprobs": 2}),
    "completion, n": ("completions", TEXT | SEVERAL),
    "completion, stream": ("completions", TEXT | {"stream": True}),
    "completion, stream, usage, logprobs": ("completions", TEXT | USAGE | {"logprobs": 1}),
    "models": ("models", None),
    "model": (f"models/{NAME}", None),
    "no such model": ("models/other", None),
}


def wire(url: str, body: dict | None) -> list:
    """The JSON of an answer, or of a stream's events, ids and times masked."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30) as reply:
            text = reply.read().decode()
    except urllib.error.HTTPError as error:
        text = error.read().decode()
    text = re.sub(r'"(chatcmpl|cmpl)-[0-9a-f]{24}"', r'"\1"', text)
    text = re.sub(r'"created":\d+', '"created":0', text)
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    return [json.loads(line) if line.startswith("{") else line for line in lines]


@pytest.fixture(scope="module")
def answers() -> dict[str, list]:
    with running(tiny_service()) as server:
        return {name: wire(f"{server.url}/v1/{path}", body) for name, (path, body) in REQUESTS.items()}


def told(answer: object, usage: bool) -> object:
    """An answer of the snapshot without what was null because nobody asked for it, or because a chunk has no news."""
    if isinstance(answer, dict):
        left_out = {"token_ids"} | ({"role", "content"} if answer.keys() == {"role", "content"} else set())
        left_out |= set() if usage else {"usage"}
        kept = {name: value for name, value in answer.items() if value is not None or name not in left_out}
        return {name: told(value, usage) for name, value in kept.items()}
    return [told(each, usage) for each in answer] if isinstance(answer, list) else answer


def near(answer: object) -> object:
    """The snapshot's answer, equal to one whose log-probabilities round to its three decimals, or would but for what
    another processor rounds otherwise."""
    if isinstance(answer, dict):
        return {name: near(value) for name, value in answer.items()}
    if isinstance(answer, list):
        return [near(each) for each in answer]
    return pytest.approx(answer, abs=0.0006) if isinstance(answer, float) else answer


@pytest.mark.parametrize("name", REQUESTS)
def test_the_wire_is_what_it_was(answers: dict[str, list], name: str) -> None:
    before = json.loads(SNAPSHOT.read_text(encoding="utf-8"))[name]
    assert answers[name] == near(told(before, "usage" in name))


def test_the_end_of_our_stream_has_no_empty_fields() -> None:
    with running(tiny_service()) as server:
        *_, end = wire(f"{server.url}/v1/ctc/stream", CHAT)
    assert end["usage"] == {"prompt_tokens": 6, "completion_tokens": 6, "total_tokens": 12}


def test_openais_client_finds_no_empty_fields_in_a_stream() -> None:
    options = CHAT | {"model": NAME, "stream": True}
    with running(tiny_service()) as server:
        first, *pieces, last = server.client().chat.completions.create(**options)
    assert first.choices[0].delta.model_fields_set == {"role", "content"}
    assert all(piece.choices[0].delta.model_fields_set == {"content"} for piece in pieces)
    assert last.choices[0].delta.model_fields_set == set()
    assert last.choices[0].finish_reason == "length"
    assert not any("usage" in chunk.model_fields_set for chunk in (first, *pieces, last))


@pytest.mark.slow
def test_openais_types_are_imported_by_the_server_alone() -> None:
    """They take a second, which no other command and no program that drafts should wait for."""
    code = "import sys, ctc_drafter, ctc_drafter.cli; sys.exit('openai' in sys.modules or 'fastapi' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
    code = "import sys; from ctc_drafter.cli import main; main(['serve', '--help']); sys.exit('openai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False, capture_output=True).returncode == 0
