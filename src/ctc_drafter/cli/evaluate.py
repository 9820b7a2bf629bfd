"""`ctc-drafter profile`, `eval` and `exactness`: step times, speed and acceptance of one drafter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ctc_drafter.cli.options import (
    BatchOption,
    CompileOption,
    DeviceOption,
    DrafterOption,
    DtypeOption,
    ExactOption,
    FloorOption,
    JsonOption,
    NewTokensOption,
    NodesOption,
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

TASKS = "mt_bench,gsm8k"
TasksOption = Annotated[
    str | None,
    typer.Option("--tasks", help="Comma-separated task names or JSONL files.", show_default=TASKS),
]
TasksPathOption = Annotated[
    Path | None,
    typer.Option(
        "--tasks-path",
        help="Folder with a file <task>.jsonl per task; without it, published benchmarks are downloaded once: "
        "mt_bench, gsm8k, humaneval, spec_bench.",
        show_default="download",
    ),
]


CopiesOption = Annotated[
    str,
    typer.Option(
        "--copies",
        help="none: the drafter without copies from the text; all: with copies, prompt lookup first; own: as it is.",
    ),
]


ReachOption = Annotated[
    int | None,
    typer.Option(
        "--nodes", min=1, help="Nodes of the largest tree that is measured.", show_default="those of --nodes auto"
    ),
]


def task_names(given: str | None) -> list[str]:
    return [name.strip() for name in (TASKS if given is None else given).split(",") if name.strip()]


def profile(
    target: TargetOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    tokenizer_name: TokenizerOption = None,
    drafter: DrafterOption = None,
    batch_size: BatchOption = 1,
    nodes: ReachOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    compiled: CompileOption = False,
    openvino: OpenVINOOption = None,
    json_out: JsonOption = None,
) -> None:
    """Measures step time by tree size on this machine, and stores it for --nodes auto and --budget."""
    import torch
    from rich.console import Console

    from ctc_drafter.decode.profile import measured_again, profile_json, profile_table, reach
    from ctc_drafter.files import check_place, write_json
    from ctc_drafter.load import load_drafter, load_target, pair
    from ctc_drafter.steps import Steps

    check_place(json_out)
    steps = Steps(compiled, openvino=openvino)
    if threads:
        torch.set_num_threads(threads)
    names = pair(target, drafter)
    lm, tokenizer = load_target(names[0], steps.dtype(dtype), device, revision, trust_remote_code, tokenizer_name)
    draft = load_drafter(names[1], lm, tokenizer)
    lm = steps.of(lm, [draft], nodes or reach(lm), batch_size)
    times = measured_again(lm, draft, nodes or reach(lm), batch_size)
    if json_out:
        write_json(json_out, profile_json(times, lm, meta(*names)))
    Console().print(profile_table(times))


def evaluate(
    tasks: TasksOption = None,
    tasks_path: TasksPathOption = None,
    target: TargetOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    tokenizer_name: TokenizerOption = None,
    chat_template: TemplateOption = None,
    chat_template_arg: TemplateArgOption = None,
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
    exact: ExactOption = False,
    openvino: OpenVINOOption = None,
    copies: CopiesOption = "own",
    also: Annotated[
        str,
        typer.Option(
            "--also",
            help="Also measure prompt_lookup, transformers' generate or other engines, comma-separated: "
            "prompt_lookup,hf,hf-compiled,hf-lookup,hf-assisted=DIR,llama.cpp,openvino. "
            "llama.cpp:q8_0:lookup=FILE has another type of weights, a speculative mode and a GGUF file.",
        ),
    ] = "",
    json_out: JsonOption = None,
) -> None:
    """Measures speedup and tokens per step over plain decoding, and compares the outputs."""
    import torch
    from rich.console import Console

    from ctc_drafter.decode.batch import DEFAULT_NODES
    from ctc_drafter.decode.profile import budget_for
    from ctc_drafter.drafters.registry import PROMPT_LOOKUP
    from ctc_drafter.evaluate.also import NAMES, located, parse_also
    from ctc_drafter.evaluate.results import results_table
    from ctc_drafter.evaluate.runner import evaluate as measure
    from ctc_drafter.evaluate.tasks import read_tasks
    from ctc_drafter.evaluate.who_copies import as_told, parse_copies
    from ctc_drafter.files import check_place, write_json
    from ctc_drafter.load import load_drafter, load_target, pair, read_template
    from ctc_drafter.steps import Steps

    check_place(json_out)
    steps = Steps(compiled, exact, openvino)
    modes = parse_copies(copies)
    if len(modes) > 1:
        refuse("eval measures one drafter in one way; give --copies none or --copies all, or use bench")
    others = parse_also(also, (PROMPT_LOOKUP, *NAMES))
    chosen = read_tasks(tasks_path, task_names(tasks))
    names = pair(target, drafter)
    if threads:
        torch.set_num_threads(threads)
    others = located(others, names[0])
    lm, tokenizer = load_target(names[0], steps.dtype(dtype), device, revision, trust_remote_code, tokenizer_name)
    read_template(tokenizer, chat_template, chat_template_arg or ())
    draft = as_told(load_drafter(names[1], lm, tokenizer), modes[0])
    lm = steps.of(lm, [draft], nodes or DEFAULT_NODES, batch_size)
    result = measure(
        lm,
        draft,
        tokenizer,
        chosen,
        limit=limit,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        nodes=nodes or DEFAULT_NODES,
        min_probability=floor,
        budget=budget_for(lm, draft, nodes or DEFAULT_NODES, batch_size) if budget else None,
        also=[name for name in others if name != names[1]],
        seed=seed,
        meta=meta(*names) | {"copies": modes[0]},
        save=(lambda value: write_json(json_out, value)) if json_out else None,
    )
    Console().print(results_table(result))
    if not result["meta"]["complete"]:
        print("interrupted: these are the batches that were finished", file=sys.stderr)
        raise typer.Exit(130)


def exactness(
    target: TargetOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    tokenizer_name: TokenizerOption = None,
    chat_template: TemplateOption = None,
    chat_template_arg: TemplateArgOption = None,
    drafter: Annotated[
        str | None,
        typer.Option("--drafter", help="Drafter for the target. With --target alone, scripted drafts are used."),
    ] = None,
    tasks_path: Annotated[
        Path | None,
        typer.Option("--tasks-path", help="Folder with a file <task>.jsonl per task.", show_default="demo's"),
    ] = None,
    tasks: Annotated[str, typer.Option("--tasks", help="Comma-separated task names or JSONL files.")] = "",
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
    from ctc_drafter.load import load_drafter, load_target, pair, read_template

    if tasks_path is not None and not tasks:
        refuse("give --tasks as well: the names of files in --tasks-path; or neither for the demo's prompts")
    if drafter and not target:
        refuse("give --target as well: a drafter serves one target only")
    check_place(json_out)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    chosen = read_tasks(tasks_path, names) if names else []
    if threads:
        torch.set_num_threads(threads)
    names_used = (target, drafter) if target else pair(target, drafter)
    lm, tokenizer = load_target(names_used[0], dtype, device, revision, trust_remote_code, tokenizer_name)
    read_template(tokenizer, chat_template, chat_template_arg or ())
    result = compare(
        lm,
        load_drafter(names_used[1], lm, tokenizer) if names_used[1] else None,
        tokenizer,
        chosen or [Task("demo", tuple(Prompt(f"demo/{i}", "demo", (text,)) for i, text in enumerate(PROMPTS)))],
        limit=limit,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        nodes=nodes or DEFAULT_NODES,
        meta=meta(*names_used),
    )
    if json_out:
        write_json(json_out, result)
    Console().print(exactness_table(result))
