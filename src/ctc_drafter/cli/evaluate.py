"""`ctc-drafter profile`, `eval`, `bench`, `report` and `exactness`: step times, speed and acceptance."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ctc_drafter.cli.options import (
    AlsoOption,
    BatchOption,
    CompileOption,
    DeviceOption,
    DrafterOption,
    DtypeOption,
    FloorOption,
    JsonOption,
    NewTokensOption,
    NodesOption,
    SeedOption,
    SomeOption,
    TargetOption,
    ThreadsOption,
    meta,
    refuse,
)


def profile(
    target: TargetOption = None,
    drafter: DrafterOption = None,
    batch_size: BatchOption = 1,
    nodes: NodesOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    compiled: CompileOption = False,
    json_out: JsonOption = None,
) -> None:
    """Measures step time by tree size on this machine, and stores it for --budget."""
    import torch
    from rich.console import Console

    from ctc_drafter.decode.batch import DEFAULT_NODES
    from ctc_drafter.decode.profile import measured_again, profile_json, profile_table
    from ctc_drafter.files import check_place, write_json
    from ctc_drafter.load import compiled_for, load_pair

    check_place(json_out)
    if threads:
        torch.set_num_threads(threads)
    lm, _, draft = load_pair(target, drafter, dtype, device)
    if compiled:
        lm = compiled_for(lm, draft, nodes or DEFAULT_NODES, batch_size)
    times = measured_again(lm, draft, nodes or DEFAULT_NODES, batch_size)
    if json_out:
        write_json(json_out, profile_json(times, lm, meta(target, drafter)))
    Console().print(profile_table(times))


def evaluate(
    tasks: Annotated[str, typer.Option("--tasks", help="Comma-separated task names.")],
    tasks_path: Annotated[Path, typer.Option("--tasks-path", help="Folder with a file <task>.jsonl per task.")],
    target: TargetOption = None,
    drafter: DrafterOption = None,
    limit: SomeOption = None,
    max_new_tokens: NewTokensOption = 128,
    batch_size: BatchOption = 1,
    nodes: NodesOption = None,
    floor: FloorOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    budget: Annotated[
        bool,
        typer.Option(
            "--budget",
            help="Also measure tree sizes chosen per step, up to --nodes, from step times measured on this machine.",
        ),
    ] = False,
    compiled: CompileOption = False,
    also: Annotated[
        str,
        typer.Option(
            "--also",
            help="Also measure prompt_lookup or transformers' generate, comma-separated: "
            "prompt_lookup,hf,hf-compiled,hf-lookup,hf-assisted=DIR.",
        ),
    ] = "",
    json_out: JsonOption = None,
) -> None:
    """Measures speedup and tokens per step over plain decoding, and compares the outputs."""
    import torch
    from rich.console import Console

    from ctc_drafter.decode.batch import DEFAULT_FLOOR, DEFAULT_NODES
    from ctc_drafter.decode.profile import budget_for
    from ctc_drafter.drafters.registry import PROMPT_LOOKUP
    from ctc_drafter.evaluate.hf_generate import NAMES, parse_also
    from ctc_drafter.evaluate.results import results_table
    from ctc_drafter.evaluate.runner import evaluate as measure
    from ctc_drafter.evaluate.tasks import read_tasks
    from ctc_drafter.files import check_place, write_json
    from ctc_drafter.load import compiled_for, load_pair

    check_place(json_out)
    others = [name for name in parse_also(also, (PROMPT_LOOKUP, *NAMES)) if name != drafter]
    chosen = read_tasks(tasks_path, [name.strip() for name in tasks.split(",") if name.strip()])
    if threads:
        torch.set_num_threads(threads)
    lm, tokenizer, draft = load_pair(target, drafter, dtype, device)
    if compiled:
        lm = compiled_for(lm, draft, nodes or DEFAULT_NODES, batch_size)
    result = measure(
        lm,
        draft,
        tokenizer,
        chosen,
        limit=limit,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        nodes=nodes or DEFAULT_NODES,
        min_probability=DEFAULT_FLOOR if floor is None else floor,
        budget=budget_for(lm, draft, nodes or DEFAULT_NODES, batch_size) if budget else None,
        also=others,
        seed=seed,
        meta=meta(target, drafter),
        save=(lambda value: write_json(json_out, value)) if json_out else None,
    )
    Console().print(results_table(result))
    if not result["meta"]["complete"]:
        print("interrupted: these are the batches that were finished", file=sys.stderr)
        raise typer.Exit(130)


def bench(
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="Comma-separated task names or JSONL files.", show_default="mt_bench,gsm8k"),
    ] = None,
    tasks_path: Annotated[
        Path | None,
        typer.Option("--tasks-path", help="Folder with a file <task>.jsonl per task.", show_default="download"),
    ] = None,
    target: TargetOption = None,
    drafters: Annotated[
        list[str] | None,
        typer.Option(
            "--drafter", help="Drafter as NAME=DIR, or prompt_lookup; may be repeated.", show_default="ctc, shipped"
        ),
    ] = None,
    nodes: Annotated[
        str | None,
        typer.Option(
            "--nodes",
            help="Comma-separated tree sizes; chain is the best single path.",
            show_default="chain,8,16,32,64",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Train a small drafter of every method on the same data, then compare them.")
    ] = False,
    ablations: Annotated[bool, typer.Option("--ablations", help="Train and compare variants of the drafter.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="Restrict --quick or --ablations to this method or variant; may be repeated."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", min=1, help="Training steps per drafter with --quick or --ablations.", show_default="160"
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            "--work",
            help="Folder for the drafters that --quick and --ablations train.",
            show_default="in the user's cache",
        ),
    ] = None,
    depths: Annotated[
        str,
        typer.Option(
            "--depths", help="Comma-separated maximum draft lengths to measure each drafter with, e.g. 3,5,7."
        ),
    ] = "",
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data", help="Folder of the target's distilled answers to train on, with --target; may be repeated."
        ),
    ] = None,
    limit: SomeOption = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", min=1, help="Maximum number of new tokens per answer.", show_default="128"),
    ] = None,
    batch_size: BatchOption = 1,
    watched: Annotated[
        int | None,
        typer.Option(
            "--watched",
            min=0,
            help="Prompts per task that are run again for the calibration curve.",
            show_default="4; 1 with --quick and --ablations",
        ),
    ] = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    compiled: CompileOption = False,
    also: AlsoOption = "",
    seed: SeedOption = 0,
    json_out: JsonOption = None,
) -> None:
    """Compares methods, tasks and tree sizes in one run; the same command resumes it."""
    import torch
    from rich.console import Console

    from ctc_drafter.drafters.prompt_lookup import PromptLookup
    from ctc_drafter.evaluate.bench import SIZES, BenchSettings, at_depths, parse_depths, parse_drafters, parse_sizes
    from ctc_drafter.evaluate.bench import bench as measure
    from ctc_drafter.evaluate.hf_generate import parse_also
    from ctc_drafter.evaluate.results import results_table
    from ctc_drafter.evaluate.tasks import read_tasks
    from ctc_drafter.evaluate.variants import QUICK, TASKS, TrainedAlike, chosen_entries
    from ctc_drafter.files import check_place
    from ctc_drafter.load import compiled_for_all, load_target

    check_place(json_out)
    named, stock, shorter = parse_drafters(drafters or []), parse_also(also), parse_depths(depths)
    if quick and ablations:
        refuse("give either --quick or --ablations")
    alike = TrainedAlike("ablations" if ablations else "methods", tuple(only or ()), steps, work, tuple(data or ()))
    if (quick or ablations) and named:
        refuse("--quick and --ablations train drafters of their own; leave out --drafter")
    if (quick or ablations) and bool(target) != bool(data):
        refuse("--quick and --ablations need --target and --data together: drafters learn from what their target wrote")
    if (quick or ablations) and target and not work:
        refuse("give --work as well: a folder for the drafters of this target")
    if not (quick or ablations) and (only or steps or work or data):
        refuse("--only, --steps, --work and --data belong to --quick or --ablations")
    if target and not (named or data):
        refuse("give --drafter as well: the shipped drafter serves the shipped target only")
    usual = QUICK if quick or ablations else BenchSettings(SIZES)
    sizes = parse_sizes(nodes) if nodes is not None else usual.sizes
    chosen = read_tasks(tasks_path, [name.strip() for name in (tasks or TASKS).split(",") if name.strip()])
    if threads:
        torch.set_num_threads(threads)
    lm, tokenizer = load_target(target, dtype, device)
    made = chosen_entries(lm, tokenizer, alike if quick or ablations else named, lambda text: print(text, flush=True))
    entries = at_depths(made, shorter)
    if compiled:
        largest = max([PromptLookup().draft_length, *(size for size in sizes if isinstance(size, int))])
        lm = compiled_for_all(lm, [entry.drafter for entry in entries.values()], largest, batch_size)
    settings = BenchSettings(
        sizes,
        limit or usual.limit,
        max_new_tokens or usual.max_new_tokens,
        batch_size,
        seed,
        usual.watched if watched is None else watched,
        stock,
    )
    about = {
        "command": meta(target, None)["command"],
        "target": target or "shipped",
        "ablations": ablations,
        "depths": shorter,
    }
    result = measure(lm, tokenizer, entries, chosen, settings, meta=about, out=json_out)
    Console().print(results_table(result))
    if not result["meta"]["complete"]:
        print("interrupted: these are the batches that were finished; the same command goes on", file=sys.stderr)
        raise typer.Exit(130)


def report(
    files: Annotated[list[Path], typer.Argument(help="Results files of bench; others are skipped.")],
    out: Annotated[
        Path, typer.Option("--out", help="Markdown page to write; figures go into the folder figures next to it.")
    ] = Path("docs/results.md"),
) -> None:
    """Writes a Markdown page of bench results: tables, figures and confidence intervals."""
    from ctc_drafter.evaluate.report_page import draw, page
    from ctc_drafter.evaluate.results import read_results
    from ctc_drafter.files import check_place

    check_place(out)
    results = read_results(files)
    drawn = draw(results, out.parent / "figures")
    out.write_text(page(results), encoding="utf-8")
    print(f"{out}: {len(results)} results, {len(drawn)} figures")


def exactness(
    target: TargetOption = None,
    drafter: Annotated[
        str | None,
        typer.Option("--drafter", help="Drafter for the target. With --target alone, scripted drafts are used."),
    ] = None,
    tasks_path: Annotated[
        Path | None,
        typer.Option("--tasks-path", help="Folder with a file <task>.jsonl per task.", show_default="demo's"),
    ] = None,
    tasks: Annotated[str, typer.Option("--tasks", help="Comma-separated task names.")] = "",
    limit: SomeOption = None,
    max_new_tokens: NewTokensOption = 128,
    batch_size: BatchOption = 4,
    nodes: NodesOption = None,
    dtype: DtypeOption = "bfloat16",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    json_out: JsonOption = None,
) -> None:
    """Counts outputs that differ from plain decoding, next to differences due to batch size or kernel."""
    import torch
    from rich.console import Console

    from ctc_drafter.cli.demo import PROMPTS
    from ctc_drafter.decode.batch import DEFAULT_NODES
    from ctc_drafter.evaluate.exactness import exactness as compare
    from ctc_drafter.evaluate.exactness import exactness_table
    from ctc_drafter.evaluate.tasks import Prompt, Task, read_tasks
    from ctc_drafter.files import check_place, write_json
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
