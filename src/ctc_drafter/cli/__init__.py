"""The `ctc-drafter` command line: demo, generate, serve, export. Heavy modules are imported when a command runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ctc_drafter.cli.evaluate import bench, evaluate, exactness, profile, report
from ctc_drafter.cli.options import (
    BatchOption,
    BudgetOption,
    CompileOption,
    DeviceOption,
    DrafterOption,
    DtypeOption,
    FloorOption,
    JsonOption,
    NewTokensOption,
    NodesOption,
    SeedOption,
    TargetOption,
    ThreadsOption,
    meta,
    refuse,
)
from ctc_drafter.cli.train import distill, recipe, train

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
    """Decodes three prompts without and with the drafter, and prints the speedup."""
    from rich.console import Console

    from ctc_drafter.cli.demo import demo as run_demo
    from ctc_drafter.decode.batch import DEFAULT_NODES
    from ctc_drafter.load import load_pair

    lm, tokenizer, draft = load_pair(target, drafter, dtype, device)
    console = Console(highlight=False)
    run_demo(lm, draft, tokenizer, console, nodes=nodes or DEFAULT_NODES, max_new_tokens=max_new_tokens)


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Option("--prompt", help="Prompt to answer; the answer is streamed.")] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option("--prompts-file", help="JSONL file of prompts, or a text file with one prompt per line."),
    ] = None,
    target: TargetOption = None,
    drafter: DrafterOption = None,
    max_new_tokens: NewTokensOption = 256,
    batch_size: BatchOption = 1,
    nodes: NodesOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    plain: Annotated[bool, typer.Option("--plain", help="Decode without a drafter, one token per step.")] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as plain text, without the chat template.")
    ] = False,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="Sampling temperature; 0 decodes greedily.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Nucleus sampling threshold.")] = 1.0,
    top_k: Annotated[
        int, typer.Option("--top-k", min=0, help="Sample from the k most probable tokens only; 0 for all.")
    ] = 0,
    seed: SeedOption = 0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="Stop string that ends an answer; may be repeated.")
    ] = None,
    budget: BudgetOption = False,
    compiled: CompileOption = False,
    json_out: JsonOption = None,
) -> None:
    """Generates the target's answer to a prompt, or to every prompt of a file."""
    from ctc_drafter.cli.answer import Answerer, AnswerSettings, answer
    from ctc_drafter.decode.batch import DEFAULT_NODES
    from ctc_drafter.evaluate.tasks import Prompt, read_prompts
    from ctc_drafter.files import check_place
    from ctc_drafter.load import compiled_for, load_drafter, load_target, pair

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
    if compiled:
        lm = compiled_for(lm, draft, settings.nodes, batch_size)
    details = meta(*names) | ({"drafter": None} if plain else {})
    answer(Answerer(lm, draft, tokenizer, settings), prompts, details, json_out, sys.stdout)


# Exports a drafter for other engines.


def export(
    out: Annotated[Path, typer.Option("--out", help="Output folder, new or empty.")],
    target: TargetOption = None,
    drafter: DrafterOption = None,
    layout: Annotated[Literal["speculators"], typer.Option("--format", help="Checkpoint format.")] = "speculators",
    width: Annotated[
        int, typer.Option("--width", min=1, help="Beam width: prefixes of each length that the search keeps.")
    ] = 8,
    dtype: DtypeOption = "bfloat16",
) -> None:
    """Exports a drafter for vLLM and SGLang, which run it with our plugin: vllm serve OUT."""
    import torch

    from ctc_drafter.chat import fingerprint
    from ctc_drafter.drafters.ctc import CTCDrafter
    from ctc_drafter.drafters.registry import open_drafter
    from ctc_drafter.integrations.export import export as write
    from ctc_drafter.load import load_config, pair, shipped
    from ctc_drafter.quickstart import DRAFTER_DIR, TARGET_DIR

    names = pair(target, drafter)
    name = names[0] or shipped(TARGET_DIR)
    config, tokenizer, _ = load_config(name)
    found = open_drafter(names[1] or shipped(DRAFTER_DIR))
    if not isinstance(found, CTCDrafter):
        refuse(f"engines run CTC drafters only, and {drafter} is another; give --drafter the folder of one")
    found.check_target(config, fingerprint(tokenizer))
    place = str(Path(name).resolve()) if Path(name).is_dir() else name
    left_out = write(found.to(getattr(torch, dtype)), config, place, out, width)
    note = f"; engines draft without {', '.join(left_out)}" if left_out else ""
    print(f"{out}: {layout}, {found.config.frames} frames{note}")


for command in (profile, bench, report, exactness, distill, train, recipe, export):
    app.command()(command)
app.command(name="eval")(evaluate)


@app.command()
def serve(
    target: TargetOption = None,
    drafter: DrafterOption = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for all interfaces.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 chooses a free one.")
    ] = 8000,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="CTC_DRAFTER_API_KEY", help="API key that clients must send.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Model name in the API.", show_default="the target's name")
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Maximum number of answers decoded in one batch.")
    ] = 8,
    queue: Annotated[int, typer.Option("--queue", min=1, help="Maximum number of answers in the queue.")] = 64,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Maximum number of new tokens per answer.")
    ] = 2048,
    max_prompt: Annotated[
        int | None,
        typer.Option("--max-prompt", min=1, help="Maximum prompt length in tokens.", show_default="the context"),
    ] = None,
    max_body: Annotated[int, typer.Option("--max-body", min=1, help="Maximum size of a request body in bytes.")] = 1
    << 20,
    timeout: Annotated[
        float, typer.Option("--timeout", help="Timeout of an answer in seconds, queueing included.")
    ] = 300.0,
    grace: Annotated[
        float, typer.Option("--grace", min=0.0, help="Seconds that running answers have to finish at shutdown.")
    ] = 10.0,
    nodes: NodesOption = None,
    floor: FloorOption = None,
    budget: BudgetOption = False,
    compiled: CompileOption = False,
    plain: Annotated[bool, typer.Option("--plain", help="Decode without a drafter, one token per step.")] = False,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Runs an OpenAI-compatible server, with a page that visualises drafts and accepted tokens."""
    import torch

    from ctc_drafter.decode.batch import DEFAULT_FLOOR, DEFAULT_NODES, DecodingConfig
    from ctc_drafter.decode.profile import budget_for
    from ctc_drafter.load import compiled_for, load_drafter, load_target, pair
    from ctc_drafter.serve.engine import Worker
    from ctc_drafter.serve.server import make_engine
    from ctc_drafter.serve.server import serve as run_server
    from ctc_drafter.serve.service import Limits, Service

    limits = Limits(max_new_tokens, max_prompt, max_body, timeout, grace)
    if threads:
        torch.set_num_threads(threads)
    names = (target, None) if plain and target else pair(target, drafter)
    size = nodes or DEFAULT_NODES
    public = name or (Path(target).resolve().name if target and Path(target).is_dir() else target)
    public = public or "ctc-drafter-quickstart"
    worker = Worker("engine")

    def ready() -> Service:
        lm, tokenizer = load_target(names[0], dtype, device)
        draft = None if plain else load_drafter(names[1], lm, tokenizer)
        if compiled:
            lm = compiled_for(lm, draft, size, batch_size)
        pays = budget_for(lm, draft, size, batch_size) if budget and draft is not None else None
        config = DecodingConfig(size, DEFAULT_FLOOR if floor is None else floor, budget=pays)
        engine = make_engine(lm, draft, batch_size, queue, config, worker)
        return Service(engine, lm, tokenizer, public, limits)

    try:
        run_server(lambda: worker.do(ready), api_key, host, port)
    except KeyboardInterrupt:
        # The worker is inside torch, and Python would abort the process when it ends such a thread.
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)
    worker.close()


def bad_input(error: Exception) -> str | None:
    """The one-line message of an error that the user can fix; None for a bug."""
    if hasattr(error, "format_message"):  # typer's own: unknown options, values out of range
        return str(error.format_message()).replace("\n", " ")
    from ctc_drafter.types import UserError, missing_extra

    return " ".join(str(error).split()) if isinstance(error, UserError) else missing_extra(error)


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
