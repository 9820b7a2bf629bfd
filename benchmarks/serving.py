"""Server throughput by number of clients, with and without the drafter: docs/serving.md.

    python -m benchmarks.serving measure --tasks mt_bench,gsm8k --tasks-path FOLDER --limit 16 \\
        --json results/serve-float32.json -- --threads 2
    python -m benchmarks.serving report docs/serving.md results/serve-*.json
"""

from __future__ import annotations

import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.request import urlopen

import typer
from openai import APIConnectionError, APIStatusError, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.pages import run, write_figures
from benchmarks.server_process import served
from ctc_drafter.evaluate.tasks import Prompt, read_tasks
from ctc_drafter.files import check_place, markdown_table, number, write_json
from ctc_drafter.provenance import environment
from ctc_drafter.types import UserError

PLAIN = "plain"
# Servers by name and the options that tell them apart. One that fits its trees to the batch is one more line.
WAYS: dict[str, tuple[str, ...]] = {PLAIN: ("--plain",), "ctc": ()}


@dataclass(frozen=True)
class Reply:
    """text: the answer. tokens: in it. seconds: from the request to its last byte."""

    text: str
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Measured:
    """All prompts once, by one number of clients at one server. verifications: those it took."""

    replies: list[Reply]
    seconds: float
    verifications: float

    @property
    def tokens(self) -> int:
        return sum(reply.tokens for reply in self.replies)

    @property
    def speed(self) -> float:
        """Tokens per second, of all clients together."""
        return self.tokens / self.seconds


Rounds = dict[tuple[int, str], list[Measured]]


def bodies_of(prompts: Sequence[Prompt], max_new_tokens: int) -> list[dict[str, Any]]:
    """Requests for greedy answers to the first turns."""
    return [
        {
            "messages": [{"role": "user", "content": prompt.turns[0]}],
            "temperature": 0,
            "max_tokens": max_new_tokens,
        }
        for prompt in prompts
    ]


def measure_once(url: str, bodies: Sequence[dict[str, Any]], clients: int) -> Measured:
    before = totals(url)[1]
    replies, seconds = ask_all(url, bodies, clients)
    return Measured(replies, seconds, totals(url)[1] - before)


def measure_all(
    urls: Mapping[str, str], bodies: Sequence[dict[str, Any]], clients: Sequence[int], rounds: int
) -> Rounds:
    """Every server, number of clients and round; one server at a time, and each of them first as often as the others.

    urls: addresses by way. A first round over a few prompts, which is not counted, warms everything up.
    """
    found: Rounds = {}
    for turn in range(rounds + 1):
        for count in clients:
            ways = list(urls)
            for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
                measured = measure_once(urls[way], bodies if turn else bodies[:count], count)
                if turn:
                    found.setdefault((count, way), []).append(measured)
    return found


def rows_of(found: Rounds) -> list[dict[str, Any]]:
    """A row per number of clients and way: medians over rounds; γ against plain decoding in the same round;
    `identical` answers are plain decoding's by the fewest clients, in the first round; seconds of answers."""
    reference = [reply.text for reply in found[min(count for count, _ in found), PLAIN][0].replies]
    rows = []
    for (count, way), rounds in found.items():
        gammas = [one.speed / plain.speed for one, plain in zip(rounds, found[count, PLAIN], strict=True)]
        seconds = [reply.seconds for one in rounds for reply in one.replies]
        texts = [[reply.text for reply in one.replies] for one in rounds]
        written = sum(one.tokens - len(one.replies) for one in rounds)  # the prefill's tokens apart
        verifications = sum(one.verifications for one in rounds)
        rows.append(
            {
                "clients": count,
                "method": way,
                "requests": len(seconds),
                "tokens": sum(one.tokens for one in rounds),
                "tokens_per_s": statistics.median(one.speed for one in rounds),
                "tokens_per_s_rounds": [one.speed for one in rounds],
                "gamma": statistics.median(gammas),
                "gamma_rounds": gammas,
                "beta": written / verifications if verifications else None,
                "p50_s": statistics.median(seconds),
                "p95_s": statistics.quantiles(seconds, n=20, method="inclusive")[18],
                "identical": sum(a == b for each in texts for a, b in zip(each, reference, strict=True)),
                "compared": len(seconds),
            }
        )
    return rows


def serving(
    prompts: Sequence[Prompt], options: Sequence[str], clients: Sequence[int], rounds: int, max_new_tokens: int
) -> dict[str, Any]:
    """`{"meta", "rows"}` of servers that are started with `options` of `ctc-drafter serve`, see `rows_of`."""
    if min(clients) < 1 or rounds < 1 or len(prompts) < 2:
        raise UserError("give at least 1 client, 1 round and 2 prompts")
    shared = ("--batch-size", str(max(clients)), *options)
    with ExitStack() as stack:
        urls = {way: stack.enter_context(served(*shared, *own)) for way, own in WAYS.items()}
        found = measure_all(urls, bodies_of(prompts, max_new_tokens), clients, rounds)
    settings = {
        "serve": shlex.join(shared),
        "prompts": len(prompts),
        "clients": list(clients),
        "rounds": rounds,
        "max_new_tokens": max_new_tokens,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return {"meta": {**environment(), **settings}, "rows": rows_of(found)}


def markdown_serving(results: Sequence[Mapping[str, Any]]) -> str:
    """A table of each result, plain decoding and ours on one line; says so when there is none."""
    if not results:
        return "Not measured yet."
    return "\n\n".join(_table(result) for result in results)


def _table(result: Mapping[str, Any]) -> str:
    meta, rows = result["meta"], result["rows"]
    plain = {row["clients"]: row for row in rows if row["method"] == PLAIN}
    head = ["clients", "method", "tokens/s", "plain", "γ", "γ by round", "β", "p50, p95 s", "plain", "identical"]
    lines = []
    for row in rows:
        if row["method"] != PLAIN:
            base = plain[row["clients"]]
            cells = [
                str(row["clients"]),
                row["method"],
                number(row["tokens_per_s"], 0),
                number(base["tokens_per_s"], 0),
            ]
            spread = f"{number(min(row['gamma_rounds']), 2)} to {number(max(row['gamma_rounds']), 2)}"
            cells += [number(row["gamma"], 2), spread, number(row["beta"], 2)]
            cells += [f"{number(each['p50_s'], 2)}, {number(each['p95_s'], 2)}" for each in (row, base)]
            lines.append([*cells, f"{row['identical']} of {row['compared']}"])
    hardware, versions = meta["hardware"], meta["versions"]
    place = (
        f"`ctc-drafter serve {meta['serve']}` and the same with `--plain`, {meta['prompts']} prompts in "
        f"{meta['rounds']} rounds, at most {meta['max_new_tokens']} new tokens; {hardware['gpu'] or hardware['cpu']}, "
        f"torch {versions['torch']}, transformers {versions['transformers']}."
    )
    return "\n".join([markdown_table(head, lines), "", place])


app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def measure(
    tasks: Annotated[str, typer.Option("--tasks", help="Comma-separated task names or JSONL files.")],
    out: Annotated[Path, typer.Option("--json", help="JSON file for the results.")],
    tasks_path: Annotated[
        Path | None, typer.Option("--tasks-path", help="Folder with a file <task>.jsonl per task.")
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", min=1, help="Maximum number of prompts per task, spread evenly over its file.")
    ] = 16,
    clients: Annotated[str, typer.Option("--clients", help="Comma-separated numbers of clients.")] = "1,4,16",
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Number of measurement rounds.")] = 3,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=2, help="Maximum number of new tokens per answer.")
    ] = 128,
    serve: Annotated[list[str] | None, typer.Argument(help="After --: options of ctc-drafter serve.")] = None,
) -> None:
    """Measures servers with the drafter and without."""
    check_place(out)
    prompts = [prompt for task in read_tasks(tasks_path, tasks.split(",")) for prompt in task.some(limit).prompts]
    try:
        counts = [int(count) for count in clients.split(",")]
    except ValueError as error:
        raise UserError(f"--clients is {clients}; give numbers with commas between, as in 1,4,16") from error
    result = serving(prompts, serve or [], counts, rounds, max_new_tokens)
    result["meta"]["command"] = shlex.join(["python", "-m", "benchmarks.serving", *sys.argv[1:]])
    write_json(out, result)
    print(markdown_serving([result]))


@app.command()
def report(page: Path, files: list[Path]) -> None:
    """Writes results into a page, between its markers."""
    write_figures(page, files, markdown_serving)


def main() -> None:
    run(app)


# A server as its clients see it: requests over HTTP, what its metrics count.

PATIENCE = 600.0  # seconds


def ask(client: OpenAI, body: dict[str, Any]) -> Reply:
    """One chat completion, not streamed. Raises `UserError` when the server refuses it, or is gone."""
    begin = time.perf_counter()
    try:
        answer = client.chat.completions.create(**body)
    except APIStatusError as error:
        message = error.body["message"] if isinstance(error.body, dict) and "message" in error.body else error.message
        raise UserError(f"the server refused a prompt: {message}") from error
    except APIConnectionError as error:
        raise gone(error) from error
    seconds = time.perf_counter() - begin
    assert answer.usage is not None
    return Reply(answer.choices[0].message.content or "", answer.usage.completion_tokens, seconds)


def ask_all(url: str, bodies: Sequence[dict[str, Any]], clients: int) -> tuple[list[Reply], float]:
    """All of them, `clients` at a time: each client asks for the next one when it has its answer.

    Returns the replies in the order of the bodies, and the seconds that all of them took together.
    """
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        try:
            model = client.models.list().data[0].id
        except APIConnectionError as error:
            raise gone(error) from error
        begin = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            replies = list(pool.map(lambda body: ask(client, {"model": model} | body), bodies))
        return replies, time.perf_counter() - begin


def totals(url: str) -> tuple[float, float]:
    """Tokens and verifications that the server has counted, in all its lanes."""
    try:
        with urlopen(f"{url}/metrics", timeout=PATIENCE) as reply:
            text = reply.read().decode()
    except OSError as error:
        raise gone(error) from error
    families = {family.name: family for family in text_string_to_metric_families(text)}
    names = ("ctc_drafter_tokens", "ctc_drafter_verifications")
    tokens, verifications = (
        sum(sample.value for sample in families[name].samples if sample.name.endswith("_total")) for name in names
    )
    return tokens, verifications


def gone(error: Exception) -> UserError:
    return UserError(f"the server does not answer any more ({error}); what it wrote before says why")


if __name__ == "__main__":
    main()
