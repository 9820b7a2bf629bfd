"""Soak test of the server: many clients for minutes, some rude, a third gone in the middle; every answer is compared
with plain decoding's, memory and file descriptors must not grow.

    python -m benchmarks.soak run --clients 200 --seconds 300 --json results/soak-tiny.json -- --batch-size 16
    python -m benchmarks.soak report docs/serving.md results/soak-*.json
"""

from __future__ import annotations

import asyncio
import json
import random
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import httpx2 as httpx
import psutil
import torch
import typer
from transformers import PreTrainedTokenizerBase

from benchmarks.pages import run, write_figures
from benchmarks.server_process import started
from ctc_drafter.chat import TextStream, encode_conversation, eos_ids
from ctc_drafter.decode.generate import plain_generate
from ctc_drafter.files import check_place, markdown_table, number, write_json
from ctc_drafter.load import load_target
from ctc_drafter.provenance import environment
from ctc_drafter.serve.protocol import Sampling
from ctc_drafter.serve.service import sampler_of, with_defaults
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
QUESTIONS = (
    "What is {a} times {b}?",
    "Name {a} animals that live in the sea.",
    "Write a sentence of {a} words about the number {b}.",
    "A train leaves at {a} o'clock and takes {b} hours. When does it arrive?",
    "Write a Python function that adds {a} to each of {b} numbers.",
)
LONGEST = 96  # tokens of an answer
LEAVES = 1 / 3
RUDE = {
    "bad JSON": (b'{"prompt": "the', 400),
    "bad UTF-8": (b'{"prompt": "\xff\xfe"}', 400),
    "unknown field": (b'{"prompt": "the", "wings": 2}', 400),
    "too long": (b'{"prompt": "' + b"cat " * 200_000 + b'"}', 400),
    "too large": (b" " * (2 << 20), 413),
}
RUDENESS = 0.1
SLOWNESS = 0.03  # clients that read a piece in a while
ERRORS = 0  # that a run may have
GROWTH = 24 << 20  # bytes from the second quarter to the last one; the first still fills caches and allocators' pools
DESCRIPTORS = 4
PATIENCE = 1800.0  # seconds that a client waits: how long an answer may take is for the server to say
IDLE = 120.0  # seconds until all rows have left
EVERY = 1.0  # seconds between two looks at memory


@dataclass(frozen=True)
class Question:
    """A request and its answer by plain decoding."""

    path: str
    body: Mapping[str, Any]
    answer: str


@dataclass
class Figures:
    """What the clients met. seconds: of whole answers. outcomes: their number by kind, `left` for clients that went
    away. errors: what should not be, a few of them in words. memory: bytes by second."""

    seconds: list[float] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    mismatches: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[float, int]] = field(default_factory=list)


def questions_of(target: Target, tokenizer: PreTrainedTokenizerBase, count: int, seed: int = 0) -> list[Question]:
    """Chats and texts, answered greedily and sampled in turn; answers are plain decoding's, one at a time."""
    random_ = random.Random(seed)
    found = []
    for place in range(count):
        question = QUESTIONS[place % len(QUESTIONS)].format(a=random_.randrange(2, 99), b=random_.randrange(2, 99))
        body: dict[str, Any] = {"max_tokens": random_.randrange(1, LONGEST)}
        body |= {"temperature": 0} if place % 2 else {"temperature": 0.9, "top_p": 0.95, "seed": place}
        ids = encode_conversation(tokenizer, [question])
        answer = plain_answer(target, tokenizer, ids, body)
        if random_.random() < 0.5:
            found.append(Question(CHAT, body | {"messages": [{"role": "user", "content": question}]}, answer))
        else:
            found.append(Question(TEXT, body | {"prompt": ids}, answer))
    return found


def plain_answer(target: Target, tokenizer: PreTrainedTokenizerBase, ids: list[int], body: Mapping[str, Any]) -> str:
    eos = frozenset(eos_ids(target.model, tokenizer))
    settings = with_defaults(Sampling.model_validate(dict(body)), target.model.generation_config)
    sampler = sampler_of(settings, settings.seed or 0, len(ids), eos, target.device)
    generation = plain_generate(target, [ids], max_new_tokens=body["max_tokens"], eos=tuple(eos), sampler=sampler)
    stream = TextStream(tokenizer)
    return stream.push(generation.tokens[0]) + stream.close()


async def visit(
    client: httpx.AsyncClient, random_: random.Random, questions: Sequence[Question], figures: Figures
) -> None:
    """One request of a client that may be rude, impatient, slow or nice."""
    if random_.random() < RUDENESS:
        kind = random_.choice(list(RUDE))
        content, status = RUDE[kind]
        reply = await client.post(TEXT, content=content, headers={"Content-Type": "application/json"})
        figures.outcomes["rude"] += 1
        if reply.status_code != status:
            figures.errors[f"{kind}: {reply.status_code}"] += 1
        return
    question, leaves = random_.choice(questions), random_.random() < LEAVES
    begin = time.perf_counter()
    if random_.random() < 0.5:
        text = await _whole(client, random_, question, leaves, figures)
    else:
        text = await _streamed(client, random_, question, leaves, figures)
    if text is not None:
        figures.seconds.append(time.perf_counter() - begin)
        figures.mismatches += text != question.answer


async def _whole(
    client: httpx.AsyncClient, random_: random.Random, question: Question, leaves: bool, figures: Figures
) -> str | None:
    asking = client.post(question.path, json=question.body)
    if leaves:
        with suppress(TimeoutError):
            await asyncio.wait_for(asking, random_.random())
        figures.outcomes["left"] += 1
        return None
    reply = await asking
    if not await _taken(reply.status_code, random_, figures):
        return None
    figures.outcomes["whole"] += 1
    choice = reply.json()["choices"][0]
    return str(choice["message"]["content"] if question.path == CHAT else choice["text"])


async def _streamed(
    client: httpx.AsyncClient, random_: random.Random, question: Question, leaves: bool, figures: Figures
) -> str | None:
    text, lines = "", 0
    pause = 0.2 if random_.random() < SLOWNESS else 0.0
    leaves_after = random_.randrange(8)
    async with client.stream("POST", question.path, json={**question.body, "stream": True}) as reply:
        if not await _taken(reply.status_code, random_, figures):
            return None
        async for line in reply.aiter_lines():
            if leaves and lines > leaves_after:
                figures.outcomes["left"] += 1
                return None
            if line == "data: [DONE]":
                figures.outcomes["streamed"] += 1
                return text
            if line.startswith("data: "):
                text += _piece(json.loads(line.removeprefix("data: ")), question.path)
                lines += 1
                await asyncio.sleep(pause)
    figures.errors["a stream without its end"] += 1
    return None


def _piece(chunk: Mapping[str, Any], path: str) -> str:
    """The text of a chunk; an error in a stream makes the answer another one."""
    if "error" in chunk:
        return f" {chunk['error']['message']}"
    choice = chunk["choices"][0]
    return str(choice["delta"].get("content") or "" if path == CHAT else choice["text"])


async def _taken(status: int, random_: random.Random, figures: Figures) -> bool:
    """Whether a request was answered; a full queue is no error, and the client comes back later."""
    if status == 429:
        figures.outcomes["queue full"] += 1
        await asyncio.sleep(random_.random())
    elif status != 200:
        figures.errors[f"status {status}"] += 1
    return status == 200


async def load(
    url: str, process: psutil.Process, questions: Sequence[Question], clients: int, seconds: float, seed: int = 0
) -> Figures:
    """So many clients for so many seconds, each of them with a request at a time; they end with the last answers."""
    figures, begin = Figures(), time.monotonic()
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)

    async def one(number: int, client: httpx.AsyncClient) -> None:
        random_ = random.Random(seed * 1_000_003 + number)
        while time.monotonic() - begin < seconds:
            try:
                await visit(client, random_, questions, figures)
            except (httpx.HTTPError, ValueError, LookupError) as error:
                figures.errors[f"{type(error).__name__}: {error}"[:200]] += 1
                await asyncio.sleep(0.1)

    async def look() -> None:
        while True:
            figures.memory.append((time.monotonic() - begin, process.memory_info().rss))
            await asyncio.sleep(EVERY)

    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits) as client:
        looking = asyncio.create_task(look())
        try:
            await asyncio.gather(*(one(number, client) for number in range(clients)))
        finally:
            looking.cancel()
    return figures


def idle(url: str, process: psutil.Process) -> tuple[int, int]:
    """Bytes and file descriptors of the server once all rows and connections are gone. Raises `UserError` for rows that
    stay."""
    end = time.monotonic() + IDLE
    with httpx.Client(base_url=url, timeout=PATIENCE) as client:
        while True:
            health = client.get("/health").json()
            if health["running"] == health["waiting"] == 0:
                break
            if time.monotonic() > end:
                raise UserError(f"{health['running']} rows are left behind {IDLE:g} s after the last client")
            time.sleep(0.2)
    time.sleep(1.0)  # connections end a moment behind their clients
    return process.memory_info().rss, process.num_fds()


def soak(serve: Sequence[str], questions: Sequence[Question], clients: int, seconds: float) -> dict[str, Any]:
    """A server, warmed up for a third of the time, then the clients for all of it. Returns the row of the table."""
    command = [sys.executable, "-m", "ctc_drafter.cli", "serve", "--port", "0", "--log-level", "error", *serve]
    with started(command) as (server, url):
        process = psutil.Process(server.pid)
        asyncio.run(load(url, process, questions, clients, seconds / 3, seed=1))
        before, files_before = idle(url, process)
        figures = asyncio.run(load(url, process, questions, clients, seconds))
        after, files_after = idle(url, process)
        died = server.poll() is not None
    return row_of(figures, (before, after), (files_before, files_after), died) | {
        "clients": clients,
        "load_seconds": seconds,
        "questions": len(questions),
    }


def row_of(figures: Figures, memory: tuple[int, int], files: tuple[int, int], died: bool = False) -> dict[str, Any]:
    """memory, files: before and behind, idle."""
    ranked = statistics.quantiles(figures.seconds, n=20) if len(figures.seconds) > 1 else [float("nan")] * 19
    return {
        "answers": len(figures.seconds),
        "outcomes": dict(sorted(figures.outcomes.items())),
        "mismatches": figures.mismatches,
        "errors": dict(figures.errors),
        "died": died,
        "p50_s": ranked[9],
        "p95_s": ranked[18],
        "memory_before": memory[0],
        "memory_after": memory[1],
        "memory": [[round(at, 1), size] for at, size in figures.memory],
        "files_before": files[0],
        "files_after": files[1],
    }


def quarters(memory: Sequence[Sequence[float]]) -> list[float]:
    """Medians of the bytes in each quarter of the samples `(second, bytes)`, of which there are four at least."""
    ends = [len(memory) * number // 4 for number in range(5)]
    return [statistics.median(size for _, size in memory[first:last]) for first, last in pairwise(ends)]


def faults(row: Mapping[str, Any], growth: int = GROWTH) -> list[str]:
    """What is wrong with a run, in words; none for a good one.

    Memory is compared under load: how much an idle server gives back to the system differs from time to time.
    """
    _, second, _, last = quarters(row["memory"])
    grown, opened = last - second, row["files_after"] - row["files_before"]
    found = {
        "the server died": row["died"],
        "no answer was compared": not row["answers"],
        f"{row['mismatches']} answers are not plain decoding's": row["mismatches"],
        f"errors: {row['errors']}": sum(row["errors"].values()) > ERRORS,
        f"memory grew by {grown / 2**20:.0f} MB from the second quarter to the last": grown > growth,
        f"{opened} file descriptors were left open": opened > DESCRIPTORS,
    }
    return [text for text, wrong in found.items() if wrong]


def markdown_soak(results: Sequence[Mapping[str, Any]]) -> str:
    """A table with a line for each result; says so when there is none."""
    if not results:
        return "Not measured yet."
    head = ["clients", "s", "answers", "streamed", "left early", "queue full", "rude", "errors", "mismatches"]
    head += ["p50, p95 s", "MB by quarter", "MB idle, before and after", "files"]
    lines = []
    for result in results:
        row = result["row"]
        kinds, memory = row["outcomes"], quarters(row["memory"])
        lines.append(
            [
                *(str(row["clients"]), number(row["load_seconds"], 0), str(row["answers"])),
                *(str(kinds.get(kind, 0)) for kind in ("streamed", "left", "queue full", "rude")),
                *(str(sum(row["errors"].values())), str(row["mismatches"])),
                ", ".join(number(row[f"p{part}_s"], 1) for part in (50, 95)),
                ", ".join(number(size / 2**20, 0) for size in memory),
                ", ".join(number(row[f"memory_{when}"] / 2**20, 0) for when in ("before", "after")),
                f"{row['files_before']}, {row['files_after']}",
            ]
        )
    meta = results[0]["meta"]
    place = (
        f"`ctc-drafter serve {meta['serve']}`, {results[0]['row']['questions']} questions, greedy and sampled; "
        f"{meta['hardware']['gpu'] or meta['hardware']['cpu']}, torch {meta['versions']['torch']}, {meta['beside']}."
    )
    return "\n".join([markdown_table(head, lines), "", place])


app = typer.Typer(add_completion=False, help=__doc__)


@app.command("run")
def run_soak(
    target: Annotated[str, typer.Option("--target", help="Target, as for ctc-drafter serve.")] = "tiny",
    clients: Annotated[int, typer.Option("--clients", min=1, help="Number of clients.")] = 200,
    seconds: Annotated[float, typer.Option("--seconds", min=4.0, help="Seconds of load, behind the warm-up.")] = 300.0,
    count: Annotated[int, typer.Option("--questions", min=2, help="Number of different questions.")] = 60,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Number of CPU threads of the server.")] = 1,
    growth: Annotated[int, typer.Option("--growth", min=0, help="MB that memory may grow by under load.")] = GROWTH
    >> 20,
    beside: Annotated[
        str, typer.Option("--beside", help="What else the machine did, for the page.")
    ] = "a quiet machine",
    out: Annotated[Path | None, typer.Option("--json", help="JSON file for the results.")] = None,
    serve: Annotated[list[str] | None, typer.Argument(help="After --: options of ctc-drafter serve.")] = None,
) -> None:
    """Runs a server under load; exit code 1 for a wrong answer, an error, or memory that grows."""
    check_place(out)
    options = ["--target", target, "--dtype", "float32", "--threads", str(threads), *(serve or ())]
    torch.set_num_threads(threads)
    questions = questions_of(*load_target(target, "float32", "auto"), count)
    row = soak(options, questions, clients, seconds)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    meta = {**environment(), "serve": shlex.join(options), "beside": beside, "date": date}
    meta["command"] = shlex.join(["python", "-m", "benchmarks.soak", *sys.argv[1:]])
    result = {"meta": meta, "row": row}
    if out is not None:
        write_json(out, result)
    print(markdown_soak([result]))
    wrong = faults(row, growth << 20)
    for text in wrong:
        print(text, file=sys.stderr)
    if wrong:
        raise typer.Exit(1)


@app.command()
def report(page: Path, files: list[Path]) -> None:
    """Writes results into a page, between its markers."""
    write_figures(page, files, markdown_soak, "soak")


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
