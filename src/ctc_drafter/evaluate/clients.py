"""A server as its clients see it: the process, requests over HTTP, what its metrics count."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from prometheus_client.parser import text_string_to_metric_families

from ctc_drafter.types import UserError

PATIENCE = 600.0  # seconds


@dataclass(frozen=True)
class Reply:
    """text: the answer. tokens: in it. seconds: from the request to its last byte."""

    text: str
    tokens: int
    seconds: float


@contextmanager
def served(*options: str) -> Iterator[str]:
    """`ctc-drafter serve OPTIONS` as a process on a free port, until the block ends; gives its address.

    Raises `UserError` with what the server said when it did not start.
    """
    command = [sys.executable, "-m", "ctc_drafter.cli", "serve", "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            if " on http" not in line:
                raise UserError(f"the server did not start: {line.strip() or 'it said nothing'}; mend its options")
            threading.Thread(target=shutil.copyfileobj, args=(process.stderr, sys.stderr), daemon=True).start()
            yield line.split(" on ")[1].split(";")[0]
        finally:
            process.terminate()


def ask(url: str, body: dict[str, Any]) -> Reply:
    """One chat completion, not streamed. Raises `UserError` when the server refuses it."""
    data = json.dumps(body).encode()
    request = Request(f"{url}/v1/chat/completions", data, {"Content-Type": "application/json"})
    begin = time.perf_counter()
    try:
        with urlopen(request, timeout=PATIENCE) as reply:
            answer = json.loads(reply.read())
    except HTTPError as error:
        message = json.loads(error.read())["error"]["message"]
        raise UserError(f"the server refused a prompt: {message}") from error
    seconds = time.perf_counter() - begin
    return Reply(answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"], seconds)


def ask_all(url: str, bodies: Sequence[dict[str, Any]], clients: int) -> tuple[list[Reply], float]:
    """All of them, `clients` at a time: each client asks for the next one when it has its answer.

    Returns the replies in the order of the bodies, and the seconds that all of them took together.
    """
    begin = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        replies = list(pool.map(lambda body: ask(url, body), bodies))
    return replies, time.perf_counter() - begin


def totals(url: str) -> tuple[float, float]:
    """Tokens and verifications that the server has counted, in all its lanes."""
    with urlopen(f"{url}/metrics", timeout=PATIENCE) as reply:
        families = {family.name: family for family in text_string_to_metric_families(reply.read().decode())}
    names = ("ctc_drafter_tokens", "ctc_drafter_verifications")
    tokens, verifications = (
        sum(sample.value for sample in families[name].samples if sample.name.endswith("_total")) for name in names
    )
    return tokens, verifications
