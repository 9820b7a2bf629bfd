"""The `ctc-drafter` command. Options and checks are here, the work is elsewhere and imported when it starts."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ctc_drafter.cli_train import distill, recipe, train
from ctc_drafter.options import (
    BatchOption,
    BudgetOption,
    DeviceOption,
    DrafterOption,
    DtypeOption,
    FloorOption,
    JsonOption,
    LimitOption,
    NewTokensOption,
    NodesOption,
    SeedOption,
    TargetOption,
    ThreadsOption,
    refuse,
)

app = typer.Typer(
    help="Lossless speculative decoding with a CTC drafter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def demo(
    target: TargetOption = None,
    drafter: DrafterOption = None,
    max_new_tokens: NewTokensOption = 128,
    nodes: NodesOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
) -> None:
    """Shows plain and CTC decoding of three prompts, and how much sooner the same text is there."""
    from rich.console import Console

    from ctc_drafter.decode.generate import DEFAULT_NODES
    from ctc_drafter.demo import demo as run_demo
    from ctc_drafter.load import load_drafter, load_target, pair

    names = pair(target, drafter)
    lm, tokenizer = load_target(names[0], dtype, device)
    draft = load_drafter(names[1], lm, tokenizer)
    console = Console(highlight=False)
    run_demo(lm, draft, tokenizer, console, nodes=nodes or DEFAULT_NODES, max_new_tokens=max_new_tokens)


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Option("--prompt", help="The text to answer; the answer streams.")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option("--prompts-file", help="JSONL of prompts, or a text file with one a line.")
    ] = None,
    target: TargetOption = None,
    drafter: DrafterOption = None,
    max_new_tokens: NewTokensOption = 256,
    batch_size: BatchOption = 1,
    nodes: NodesOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    plain: Annotated[bool, typer.Option("--plain", help="Decode without a drafter.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="Sample, the wilder the higher; 0 is greedy.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Sample from the likeliest tokens of this mass.")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Sample from so many likeliest tokens; 0: all.")] = 0,
    seed: SeedOption = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Text that ends an answer; may be repeated.")] = None,
    budget: BudgetOption = False,
    json_out: JsonOption = None,
) -> None:
    """Answers a prompt, or every prompt of a file, in the target's own words."""
    from ctc_drafter.answer import Answerer, AnswerSettings, answer
    from ctc_drafter.decode.generate import DEFAULT_NODES
    from ctc_drafter.evaluate.run import check_place
    from ctc_drafter.evaluate.tasks import Prompt, read_prompts
    from ctc_drafter.load import load_drafter, load_target, pair

    if (prompt is None) == (prompts_file is None):
        refuse("give either --prompt or --prompts-file")
    if prompt is not None and not prompt.strip():
        refuse("the prompt is empty; give some text to --prompt")
    check_place(json_out)
    settings = AnswerSettings(
        max_new_tokens,
        batch_size,
        nodes or DEFAULT_NODES,
        raw,
        temperature,
        top_k,
        top_p,
        seed,
        tuple(stop or ()),
        budget,
    )
    prompts = read_prompts(prompts_file) if prompts_file else (Prompt("prompt", "prompt", (prompt or "",)),)
    names = (target, None) if plain and target else pair(target, drafter)
    lm, tokenizer = load_target(names[0], dtype, device)
    draft = None if plain else load_drafter(names[1], lm, tokenizer)
    details = meta(*names) | ({"drafter": None} if plain else {})
    answer(Answerer(lm, draft, tokenizer, settings), prompts, details, json_out, sys.stdout)


@app.command()
def profile(
    target: TargetOption = None,
    drafter: DrafterOption = None,
    batch_size: BatchOption = 1,
    nodes: NodesOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    json_out: JsonOption = None,
) -> None:
    """Measures what a step costs on this machine by tree size, and keeps it for --budget."""
    import torch
    from rich.console import Console

    from ctc_drafter.decode.generate import DEFAULT_NODES
    from ctc_drafter.evaluate.run import check_place, write_json
    from ctc_drafter.load import load_drafter, load_target, pair
    from ctc_drafter.profile import measured_again, profile_json, profile_table

    check_place(json_out)
    if threads:
        torch.set_num_threads(threads)
    names = pair(target, drafter)
    lm, tokenizer = load_target(names[0], dtype, device)
    times = measured_again(lm, load_drafter(names[1], lm, tokenizer), nodes or DEFAULT_NODES, batch_size)
    if json_out:
        write_json(json_out, profile_json(times, lm, meta(*names)))
    Console().print(profile_table(times))


@app.command(name="eval")
def evaluate(
    tasks: Annotated[str, typer.Option("--tasks", help="Names of tasks, with commas between them.")],
    tasks_path: Annotated[Path, typer.Option("--tasks-path", help="Folder with a <task>.jsonl for each.")],
    target: TargetOption = None,
    drafter: DrafterOption = None,
    limit: LimitOption = None,
    max_new_tokens: NewTokensOption = 128,
    batch_size: BatchOption = 1,
    nodes: NodesOption = None,
    floor: FloorOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    budget: Annotated[
        bool, typer.Option("--budget", help="Also trees as large as pays on this machine, up to --nodes.")
    ] = False,
    json_out: JsonOption = None,
) -> None:
    """Measures speed and acceptance against plain decoding, and compares the outputs."""
    import torch
    from rich.console import Console

    from ctc_drafter.decode.generate import DEFAULT_FLOOR, DEFAULT_NODES
    from ctc_drafter.evaluate.report import results_table
    from ctc_drafter.evaluate.run import check_place, write_json
    from ctc_drafter.evaluate.run import evaluate as measure
    from ctc_drafter.evaluate.tasks import read_tasks
    from ctc_drafter.load import load_drafter, load_target, pair
    from ctc_drafter.profile import budget_for

    check_place(json_out)
    chosen = read_tasks(tasks_path, [name.strip() for name in tasks.split(",") if name.strip()])
    if threads:
        torch.set_num_threads(threads)
    names = pair(target, drafter)
    lm, tokenizer = load_target(names[0], dtype, device)
    draft = load_drafter(names[1], lm, tokenizer)
    result = measure(
        lm,
        draft,
        tokenizer,
        chosen,
        limit=limit,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        nodes=nodes or DEFAULT_NODES,
        floor=DEFAULT_FLOOR if floor is None else floor,
        budget=budget_for(lm, draft, nodes or DEFAULT_NODES, batch_size) if budget else None,
        seed=seed,
        meta=meta(*names),
        save=(lambda value: write_json(json_out, value)) if json_out else None,
    )
    Console().print(results_table(result))
    if not result["meta"]["complete"]:
        print("interrupted: these are the batches that were finished", file=sys.stderr)
        raise typer.Exit(130)


@app.command()
def bench(
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="Names, or JSONL files, with commas.", show_default="mt_bench,gsm8k"),
    ] = None,
    tasks_path: Annotated[
        Path | None, typer.Option("--tasks-path", help="Folder with a <task>.jsonl for each.", show_default="download")
    ] = None,
    target: TargetOption = None,
    drafters: Annotated[
        list[str] | None,
        typer.Option("--drafter", help="NAME=DIR, or prompt_lookup; may be repeated.", show_default="ctc, shipped"),
    ] = None,
    nodes: Annotated[
        str | None, typer.Option("--nodes", help="chain and tree sizes.", show_default="chain,8,16,32,64")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Train small drafters of every method alike, then compare them briefly.")
    ] = False,
    ablations: Annotated[bool, typer.Option("--ablations", help="Train and compare variants of the drafter.")] = False,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Of these methods or variants; may be repeated.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Of --quick's and --ablations' trainings.", show_default="160")
    ] = None,
    work: Annotated[
        Path | None, typer.Option("--work", help="Folder for what they train.", show_default="in the user's cache")
    ] = None,
    limit: LimitOption = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.", show_default="128")
    ] = None,
    batch_size: BatchOption = 1,
    watched: Annotated[
        int, typer.Option("--watched", min=0, help="Prompts of a task that run once more for the calibration curve.")
    ] = 4,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    json_out: JsonOption = None,
) -> None:
    """Measures methods, tasks and tree sizes in one run; the same command goes on where it was killed."""
    import torch
    from rich.console import Console

    from ctc_drafter.evaluate.bench import SIZES, BenchSettings, parse_drafters, parse_sizes
    from ctc_drafter.evaluate.bench import bench as measure
    from ctc_drafter.evaluate.named import chosen_entries
    from ctc_drafter.evaluate.quick import QUICK, TASKS, TrainedAlike
    from ctc_drafter.evaluate.report import results_table
    from ctc_drafter.evaluate.run import check_place
    from ctc_drafter.evaluate.tasks import read_tasks
    from ctc_drafter.load import load_target

    check_place(json_out)
    named = parse_drafters(drafters or [])
    if quick and ablations:
        refuse("give either --quick or --ablations")
    alike = TrainedAlike("ablations" if ablations else "methods", tuple(only or ()), steps, work)
    if (quick or ablations) and (target or named):
        refuse("--quick and --ablations train drafters of the shipped target; leave out --target and --drafter")
    if not (quick or ablations) and (only or steps or work):
        refuse("--only, --steps and --work belong to --quick or --ablations")
    if target and not named:
        refuse("give --drafter as well: the shipped drafter serves the shipped target only")
    usual = QUICK if quick or ablations else BenchSettings(SIZES)
    sizes = parse_sizes(nodes) if nodes is not None else usual.sizes
    chosen = read_tasks(tasks_path, [name.strip() for name in (tasks or TASKS).split(",") if name.strip()])
    if threads:
        torch.set_num_threads(threads)
    lm, tokenizer = load_target(target, dtype, device)
    entries = chosen_entries(
        lm, tokenizer, alike if quick or ablations else named, lambda text: print(text, flush=True)
    )
    settings = BenchSettings(
        sizes, limit or usual.limit, max_new_tokens or usual.max_new_tokens, batch_size, seed, watched
    )
    about = {"command": meta(target, None)["command"], "target": target or "shipped", "ablations": ablations}
    result = measure(lm, tokenizer, entries, chosen, settings, meta=about, out=json_out)
    Console().print(results_table(result))
    if not result["meta"]["complete"]:
        print("interrupted: these are the batches that were finished; the same command goes on", file=sys.stderr)
        raise typer.Exit(130)


@app.command()
def report(
    files: Annotated[list[Path], typer.Argument(help="Results that bench wrote; others are left out.")],
    out: Annotated[Path, typer.Option("--out", help="The page; figures go into a folder beside it.")] = Path(
        "docs/results.md"
    ),
) -> None:
    """Writes tables and figures of benches, with intervals, into a page."""
    from ctc_drafter.evaluate.page import draw, page
    from ctc_drafter.evaluate.results import read_results
    from ctc_drafter.evaluate.run import check_place

    check_place(out)
    results = read_results(files)
    drawn = draw(results, out.parent / "figures")
    out.write_text(page(results), encoding="utf-8")
    print(f"{out}: {len(results)} results, {len(drawn)} figures")


@app.command()
def exactness(
    target: TargetOption = None,
    drafter: Annotated[
        str | None, typer.Option("--drafter", help="Its drafter. With --target alone, drafts are made up.")
    ] = None,
    tasks_path: Annotated[
        Path | None, typer.Option("--tasks-path", help="Folder with a <task>.jsonl for each.", show_default="demo's")
    ] = None,
    tasks: Annotated[str, typer.Option("--tasks", help="Names of tasks, with commas between them.")] = "",
    limit: LimitOption = None,
    max_new_tokens: NewTokensOption = 128,
    batch_size: BatchOption = 4,
    nodes: NodesOption = None,
    dtype: DtypeOption = "bfloat16",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    json_out: JsonOption = None,
) -> None:
    """Counts outputs that differ from plain decoding, beside what another batch size or kernel changes."""
    import torch
    from rich.console import Console

    from ctc_drafter.decode.generate import DEFAULT_NODES
    from ctc_drafter.demo import PROMPTS
    from ctc_drafter.evaluate.exactness import exactness as compare
    from ctc_drafter.evaluate.exactness import exactness_table
    from ctc_drafter.evaluate.run import check_place, write_json
    from ctc_drafter.evaluate.tasks import Prompt, Task, read_tasks
    from ctc_drafter.load import load_drafter, load_target

    if (tasks_path is None) != (not tasks):
        refuse("give --tasks and --tasks-path together, or neither for the demo's prompts")
    if drafter and not target:
        refuse("give --target as well: a drafter serves one target only")
    check_place(json_out)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    chosen = read_tasks(tasks_path, names) if tasks_path else []
    if threads:
        torch.set_num_threads(threads)
    lm, tokenizer = load_target(target, dtype, device)
    result = compare(
        lm,
        load_drafter(drafter, lm, tokenizer) if drafter or not target else None,
        tokenizer,
        chosen or [Task("demo", tuple(Prompt(f"demo/{i}", "demo", (text,)) for i, text in enumerate(PROMPTS)))],
        limit=limit,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        nodes=nodes or DEFAULT_NODES,
        meta=meta(target, drafter) | ({"drafter": None} if target and not drafter else {}),
    )
    if json_out:
        write_json(json_out, result)
    Console().print(exactness_table(result))


for command in (distill, train, recipe):
    app.command()(command)


@app.command()
def serve(
    target: TargetOption = None,
    drafter: DrafterOption = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="CTC_DRAFTER_API_KEY", help="Clients must send it.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="What clients call the model.", show_default="the target's name")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Answers decoded together.")] = 8,
    queue: Annotated[int, typer.Option("--queue", min=1, help="Answers that may wait.")] = 64,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")] = 2048,
    max_prompt: Annotated[
        int | None, typer.Option("--max-prompt", min=1, help="Longest prompt, in tokens.", show_default="the context")
    ] = None,
    max_body: Annotated[int, typer.Option("--max-body", min=1, help="Longest request, in bytes.")] = 1 << 20,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds of an answer, its wait included.")] = 300.0,
    grace: Annotated[
        float, typer.Option("--grace", min=0.0, help="Seconds that answers have left when the server stops.")
    ] = 10.0,
    nodes: NodesOption = None,
    floor: FloorOption = None,
    budget: BudgetOption = False,
    plain: Annotated[bool, typer.Option("--plain", help="Decode without a drafter.")] = False,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Serves OpenAI's API, and a page that shows the drafter at work."""
    import torch

    from ctc_drafter.decode.generate import DEFAULT_FLOOR, DEFAULT_NODES
    from ctc_drafter.load import load_drafter, load_target, pair
    from ctc_drafter.profile import budget_for
    from ctc_drafter.serve.run import make_engine
    from ctc_drafter.serve.run import serve as run_server
    from ctc_drafter.serve.service import Limits, Service

    limits = Limits(max_new_tokens, max_prompt, max_body, timeout, grace)
    if threads:
        torch.set_num_threads(threads)
    names = (target, None) if plain and target else pair(target, drafter)
    lm, tokenizer = load_target(names[0], dtype, device)
    draft = None if plain else load_drafter(names[1], lm, tokenizer)
    chosen = (nodes or DEFAULT_NODES, DEFAULT_FLOOR if floor is None else floor)
    pays = budget_for(lm, draft, chosen[0], batch_size) if budget and draft is not None else None
    engine = make_engine(lm, draft, *chosen, batch_size, queue, pays)
    public = name or (Path(target).name if target and Path(target).is_dir() else target) or "ctc-drafter-quickstart"
    run_server(Service(engine, lm, tokenizer, public, limits), api_key, host, port)


def meta(target: str | None, drafter: str | None) -> dict[str, Any]:
    return {
        "command": shlex.join(["ctc-drafter", *sys.argv[1:]]),
        "target": target or "shipped",
        "drafter": drafter or "shipped",
    }


def bad_input(error: Exception) -> str | None:
    """The one line to show for an error that the user can mend; None for a bug."""
    if hasattr(error, "format_message"):  # typer's own: unknown options, values out of range
        return str(error.format_message()).replace("\n", " ")
    from ctc_drafter.types import UserError

    return " ".join(str(error).split()) if isinstance(error, UserError) else None


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    try:
        return int(app(args=arguments, prog_name="ctc-drafter", standalone_mode=False) or 0)
    except Exception as error:
        message = bad_input(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
