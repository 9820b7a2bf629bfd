"""Load: many clients at once, some rude, some gone in the middle; every answer is plain decoding's and memory is flat.

`LOAD_CLIENTS=200 LOAD_SECONDS=300 LOAD_JSON=results/load.json pytest -m slow tests/serve/test_serve_load.py` is the
long one.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2 as httpx
import psutil
import pytest

from ctc_drafter.target.model import Target
from serve_helpers import KEY, plain_texts, tiny_service
from tiny_models import save_pair

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
CLIENTS = int(os.environ.get("LOAD_CLIENTS", "40"))
SECONDS = float(os.environ.get("LOAD_SECONDS", "30"))
JSON = os.environ.get("LOAD_JSON")
HEADERS = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
GROWTH = 48 << 20  # bytes that allocators may keep after the warm-up
RUDE = {
    "too long": (b'{"prompt": "' + b"cat " * 600 + b'"}', 400),
    "bad JSON": (b'{"prompt": "the', 400),
    "bad UTF-8": (b'{"prompt": "\xff\xfe"}', 400),
    "too large": (b" " * (2 << 20), 413),
}


@dataclass
class Figures:
    seconds: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    mismatches: int = 0

    def report(self, before: int, after: int) -> dict[str, object]:
        ranked = statistics.quantiles(self.seconds, n=20)
        return {
            "clients": CLIENTS,
            "load_seconds": SECONDS,
            "statuses": dict(self.statuses),
            "answers": len(self.seconds),
            "mismatches": self.mismatches,
            "p50_s": ranked[9],
            "p95_s": ranked[18],
            "memory_before": before,
            "memory_after": after,
        }


@contextmanager
def served(folder: Path, port: int = 0):
    """`ctc-drafter serve` as a process: (process, address)."""
    target, drafter = folder / "target", folder / "drafter"
    command = [sys.executable, "-m", "ctc_drafter.cli", "serve", "--target", str(target), "--drafter", str(drafter)]
    command += ["--port", str(port), "--api-key", KEY, "--batch-size", "8", "--queue", "32", "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert " on http://" in line, line
        yield process, line.split(" on ")[1].split(";")[0]
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pair")
    save_pair(path)
    return path


@pytest.fixture(scope="module")
def asked(folder):
    """Requests and what plain decoding answers."""
    service = tiny_service()
    saved = Target.load(str(folder / "target"))
    assert plain_texts(service, [5, 6, 7], 8) == plain_texts(
        type(service)(service.engine, saved, service.tokenizer, "x"), [5, 6, 7], 8
    )
    random_ = random.Random(0)
    found = []
    for seed in range(24):
        ids = [random_.randrange(5, 280) for _ in range(random_.randrange(1, 120))]
        limit, greedy = random_.randrange(1, 80), seed % 3 == 0
        settings = {} if greedy else {"seed": seed, "temperature": 0.9, "top_p": 0.95}
        body = {"prompt": ids, "max_tokens": limit, **({"temperature": 0} if greedy else settings)}
        found.append((body, plain_texts(service, ids, limit, **settings)[0]))
    return found


async def visit(client: httpx.AsyncClient, random_: random.Random, asked, figures: Figures) -> None:
    """One request of a client that may be rude, impatient or nice."""
    kind = random_.random()
    if kind < 0.15:
        name = random_.choice(list(RUDE))
        content, status = RUDE[name]
        reply = await client.post("/v1/completions", content=content, headers=HEADERS)
        figures.statuses[f"{name}: {reply.status_code}"] += 1
        assert reply.status_code == status
        return
    if kind < 0.2:
        reply = await client.post("/v1/completions", json={"prompt": "a"}, headers={"Authorization": "Bearer no"})
        assert reply.status_code == 401
        return
    body, expected = random_.choice(asked)
    begin, text = time.perf_counter(), ""
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}, headers=HEADERS) as reply:
        figures.statuses[str(reply.status_code)] += 1
        if reply.status_code == 429:
            await asyncio.sleep(random_.random())
            return
        assert reply.status_code == 200
        leaves_after = random_.randrange(5) if kind < 0.4 else None
        count = 0
        async for line in reply.aiter_lines():
            if leaves_after is not None and count > leaves_after:
                figures.statuses["left"] += 1
                return
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
            count += 1
            if kind > 0.97:
                await asyncio.sleep(0.2)  # reads slowly
    figures.seconds.append(time.perf_counter() - begin)
    figures.mismatches += text != expected


async def load(url: str, asked, seconds: float, figures: Figures) -> None:
    end = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:

        async def one(number: int) -> None:
            random_ = random.Random(number)
            while time.monotonic() < end:
                await visit(client, random_, asked, figures)

        await asyncio.gather(*(one(number) for number in range(CLIENTS)))


def wait_idle(url: str) -> None:
    for _ in range(200):
        health = httpx.get(f"{url}/health").json()
        if health["running"] == health["waiting"] == 0:
            return
        time.sleep(0.1)
    raise AssertionError("rows are left behind")


def test_many_clients(folder, asked):
    figures = Figures()
    with served(folder) as (process, url):
        asyncio.run(load(url, asked, SECONDS / 3, Figures()))
        wait_idle(url)
        before = psutil.Process(process.pid).memory_info().rss
        asyncio.run(load(url, asked, SECONDS, figures))
        wait_idle(url)
        after = psutil.Process(process.pid).memory_info().rss
        assert process.poll() is None
    report = figures.report(before, after)
    print(json.dumps(report))
    if JSON:
        Path(JSON).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    assert figures.mismatches == 0
    assert len(figures.seconds) > CLIENTS
    assert after - before < GROWTH


def test_killed_and_started_again(folder, asked):
    body, expected = max(asked, key=lambda pair: pair[0]["max_tokens"])
    with served(folder) as (process, url):
        port = int(url.rsplit(":", 1)[1])
        with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}, headers=HEADERS) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(signal.SIGKILL)
            with pytest.raises(httpx.HTTPError):
                list(lines)
    with served(folder, port) as (process, url):
        reply = httpx.post(f"{url}/v1/completions", json=body, headers=HEADERS, timeout=60)
        assert reply.json()["choices"][0]["text"] == expected
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == -signal.SIGTERM
