"""Help of the commands: groups of options, an example for each command, and what Ctrl-C leaves of long ones."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Annotated, Any, get_args

import typer

# Options of all commands by their group in --help; those of no group come first.
PANELS = {
    "Model": "target revision trust-remote-code drafter dtype device attn load-in-4bit load-in-8bit chat-template "
    "chat-template-arg tokenizer threads",
    "Decoding": "max-new-tokens batch-size nodes floor budget compile exact openvino plain raw",
    "Sampling": "temperature top-p top-k seed stop prompt-temperature",
    "Drafter's sizes": "frames draft-length draft-layers predictor-rank carry carry-rank convolution copies lookup "
    "draft-vocabulary init",
    "Training": "steps epochs learning-rate anchors loss bf16 set held-out max-length resume method",
    "Memory and time": "features features-limit shard-target estimate flops bandwidth",
    "Hugging Face hub": "push-to-hub private",
    "Limits": "queue max-prompt max-body timeout grace connections keep-alive",
    "Access": "api-key allowed-host allow-origin",
    "Server that runs the target": "server model concurrency retries",
    "Log": "log-level log-format",
    "Drafters that bench trains": "quick ablations only work data steps",
}
PANEL_OF = {f"--{name}": panel for panel, names in PANELS.items() for name in names.split()}
OF_ONE = {"train": dict.fromkeys(("--steps", "--batch-size", "--seed"), "Training")}  # where the table is not right
KEEP = {"train": {"--data"}, "serve": {"--model"}}  # options that stand first there, in spite of the table

EXAMPLES = {
    "demo": "ctc-drafter demo --target smollm2",
    "generate": 'ctc-drafter generate --target Qwen/Qwen3-8B --prompt "Why is the sky blue?"',
    "chat": "ctc-drafter chat --target Qwen/Qwen3-8B --chat-template-arg enable_thinking=false",
    "serve": "ctc-drafter serve --target Qwen/Qwen3-8B --port 8000",
    "export": "ctc-drafter export --target MODEL --drafter drafter/ --out exported/",
    "profile": "ctc-drafter profile --target MODEL --drafter drafter/ --nodes 64",
    "eval": "ctc-drafter eval --target MODEL --drafter drafter/ --tasks mt_bench --limit 16 --json out.json",
    "bench": "ctc-drafter bench --target MODEL --drafter ctc=drafter/ --drafter prompt_lookup --json out.json",
    "report": "ctc-drafter report out.json --out results.md",
    "exactness": "ctc-drafter exactness --target MODEL --drafter drafter/ --dtype bfloat16",
    "distill": "ctc-drafter distill --target MODEL --prompts prompts.jsonl --out answers/",
    "train": "ctc-drafter train --target MODEL --data answers/ --out drafter/",
    "recipe": "ctc-drafter recipe qwen3-8b --target MODEL --estimate",
}


def registered(app: typer.Typer, name: str, command: Callable[..., Any], **settings: Any) -> None:
    """Adds a command with its groups and its example."""
    parameters = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        kind, shared = get_args(parameter.annotation)[:2]
        option = copy.copy(shared)  # other commands have it, too
        long = str(option.default or "").partition("/")[0]  # typer keeps the names there
        if option.rich_help_panel is None and long not in KEEP.get(name, ()):
            option.rich_help_panel = OF_ONE.get(name, {}).get(long, PANEL_OF.get(long))
        if kind in (bool, bool | None):
            option.metavar = ""  # a switch takes no value; typer would write <bool>
        parameters.append(parameter.replace(annotation=Annotated[kind, option]))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    app.command(name=name, epilog=f"Example: {EXAMPLES[name]}", **settings)(command)


def resumable(command: Callable[..., None]) -> Callable[..., None]:
    """A command that says, when it is interrupted, that the same command goes on."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except KeyboardInterrupt as error:
            print("interrupted; the same command goes on", file=sys.stderr, flush=True)
            raise typer.Exit(getattr(error, "code", 130)) from error

    return run
