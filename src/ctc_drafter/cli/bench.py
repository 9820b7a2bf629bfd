"""`ctc-drafter bench` and `report`: methods compared on the same prompts, and the page of what was found."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ctc_drafter.cli.evaluate import TasksOption, TasksPathOption, task_names
from ctc_drafter.cli.options import (
    AlsoOption,
    BatchOption,
    CompileOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    OpenVINOOption,
    RevisionOption,
    SeedOption,
    SomeOption,
    TargetOption,
    TemplateArgOption,
    TemplateOption,
    ThreadsOption,
    TokenizerOption,
    TrustOption,
    meta,
    refuse,
)

CopiesOption = Annotated[
    str | None,
    typer.Option(
        "--copies",
        help="Aids beside the networks: none (nothing is copied from the text), all (every drafter copies, prompt "
        "lookup first), none,all for both, or own (each as it is).",
        show_default="none,all; own with --ablations",
    ),
]

TokensOnlyOption = Annotated[
    bool,
    typer.Option(
        "--tokens-only",
        help="Count tokens per step along plain decoding's answers, without timing: needs no quiet machine, and a "
        "fraction of the time.",
    ),
]


def bench(
    tasks: TasksOption = None,
    tasks_path: TasksPathOption = None,
    target: TargetOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    tokenizer_name: TokenizerOption = None,
    chat_template: TemplateOption = None,
    chat_template_arg: TemplateArgOption = None,
    drafters: Annotated[
        list[str] | None,
        typer.Option(
            "--drafter", help="Drafter as NAME=DIR, or prompt_lookup; may be repeated.", show_default="the target's"
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
    copies: CopiesOption = None,
    learning_rates: Annotated[
        str,
        typer.Option(
            "--learning-rates",
            help="Comma-separated learning rates; with --quick or --ablations each drafter is trained at every one, "
            "and its best on held-out rows is kept.",
            show_default="one for all",
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
    openvino: OpenVINOOption = None,
    also: AlsoOption = "",
    tokens_only: TokensOnlyOption = False,
    seed: SeedOption = 0,
    json_out: JsonOption = None,
) -> None:
    """Compares methods, tasks and tree sizes in one run; the same command resumes it."""
    import torch
    from rich.console import Console

    from ctc_drafter.drafters.prompt_lookup import PromptLookup
    from ctc_drafter.drafters.registry import PROMPT_LOOKUP
    from ctc_drafter.evaluate.also import located, parse_also
    from ctc_drafter.evaluate.bench import SIZES, BenchSettings, at_depths, parse_depths, parse_drafters, parse_sizes
    from ctc_drafter.evaluate.bench import bench as measure
    from ctc_drafter.evaluate.costs import cost_table
    from ctc_drafter.evaluate.results import COPYING, apart, results_table
    from ctc_drafter.evaluate.tasks import read_tasks
    from ctc_drafter.evaluate.variants import QUICK, TrainedAlike, chosen_entries, parse_rates
    from ctc_drafter.evaluate.who_copies import given_copies, parse_copies
    from ctc_drafter.files import check_place
    from ctc_drafter.load import load_target, pair, read_template, refuse_missing
    from ctc_drafter.provenance import template_hash
    from ctc_drafter.steps import Steps
    from ctc_drafter.target.names import TINY

    check_place(json_out)
    way = Steps(compiled, openvino=openvino)
    named, stock, shorter = parse_drafters(drafters or []), parse_also(also), parse_depths(depths)
    if quick and ablations:
        refuse("give either --quick or --ablations")
    modes = parse_copies(copies if copies is not None else "own" if ablations else "none,all")
    rates = parse_rates(learning_rates)
    alike = TrainedAlike(
        "ablations" if ablations else "methods", tuple(only or ()), steps, work, tuple(data or ()), rates
    )
    if tokens_only and stock:
        refuse("--tokens-only times nothing, which --also is for; leave one of them out")
    if (quick or ablations) and named:
        refuse("--quick and --ablations train drafters of their own; leave out --drafter")
    if (quick or ablations) and bool(target) != bool(data):
        refuse("--quick and --ablations need --target and --data together: drafters learn from what their target wrote")
    if (quick or ablations) and target and not work:
        refuse("give --work as well: a folder for the drafters of this target")
    if not (quick or ablations) and (only or steps or work or data or rates):
        refuse("--only, --steps, --work, --data and --learning-rates belong to --quick or --ablations")
    if named and not target and set(named.values()) != {PROMPT_LOOKUP}:
        refuse("give --target as well: a drafter serves one target only")
    usual = QUICK if quick or ablations else BenchSettings(SIZES)
    sizes = parse_sizes(nodes) if nodes is not None else usual.sizes
    chosen = read_tasks(tasks_path, task_names(tasks))
    if threads:
        torch.set_num_threads(threads)
    if quick or ablations:
        name = target or TINY  # whose answers ship as well
    else:
        name, own = pair(target, PROMPT_LOOKUP if named else None)
        named = named or {"": own}
        for place in named.values():
            refuse_missing(place)
    stock = located(stock, name)
    lm, tokenizer = load_target(name, way.dtype(dtype), device, revision, trust_remote_code, tokenizer_name)
    read_template(tokenizer, chat_template, chat_template_arg or ())
    made = chosen_entries(lm, tokenizer, alike if quick or ablations else named, lambda text: print(text, flush=True))
    entries = at_depths(given_copies(made, modes), shorter)
    largest = max([PromptLookup().draft_length, *(size for size in sizes if isinstance(size, int))])
    lm = way.of(lm, [entry.drafter for entry in entries.values()], largest, batch_size)
    settings = BenchSettings(
        sizes,
        limit or usual.limit,
        max_new_tokens or usual.max_new_tokens,
        batch_size,
        seed,
        usual.watched if watched is None else watched,
        stock,
        tokens_only,
    )
    about = {
        "command": meta(name, None)["command"],
        "target": name,
        "ablations": ablations,
        "template": template_hash(tokenizer),
        "depths": shorter,
        "copies": modes,
    }
    result = measure(lm, tokenizer, entries, chosen, settings, meta=about, out=json_out)
    for mode, part in apart(result):
        if mode in COPYING:
            print(f"{COPYING[mode].capitalize()}:")
        Console().print(results_table(below_heading(part)))
        Console().print(cost_table(part))
    if not result["meta"]["complete"]:
        print("interrupted: these are the batches that were finished; the same command goes on", file=sys.stderr)
        raise typer.Exit(130)


def below_heading(part: dict[str, Any]) -> dict[str, Any]:
    """A result whose methods do not say again what the heading says, so that its table fits 80 columns."""
    return part | {"rows": [row | {"method": row["method"].removesuffix(", copies")} for row in part["rows"]]}


def report(
    files: Annotated[list[Path], typer.Argument(help="Results files of bench; others are skipped.")],
    out: Annotated[
        Path, typer.Option("--out", help="Markdown page to write; figures go into the folder figures next to it.")
    ] = Path("docs/results.md"),
) -> None:
    """Writes a Markdown page of bench results: tables, figures and confidence intervals."""
    from ctc_drafter.evaluate.report_page import draw, page
    from ctc_drafter.evaluate.results import read_results
    from ctc_drafter.files import check_place, make_folder

    results = read_results(files)
    make_folder(out.parent)
    check_place(out)
    drawn = draw(results, out.parent / "figures")
    out.write_text(page(results), encoding="utf-8")
    print(f"{out}: {len(results)} results, {len(drawn)} figures")
