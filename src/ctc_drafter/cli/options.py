"""Options that several commands share."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

Dtype = Literal["float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]

TargetOption = Annotated[
    str | None, typer.Option("--target", help="Target: folder or hub id. Default: the shipped one.")
]
DrafterOption = Annotated[
    str | None,
    typer.Option("--drafter", help="Its drafter: folder, hub id or prompt_lookup. Default: the shipped one."),
]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Number format of target and drafter.")]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where to run; auto takes CUDA if there is one.")]
NodesOption = Annotated[
    int | None, typer.Option("--nodes", min=1, help="Drafted tokens that one verification checks.", show_default="16")
]
FloorOption = Annotated[
    float | None,
    typer.Option("--floor", min=0.0, max=0.99, help="Least likely draft that is checked.", show_default="0.05"),
]
BudgetOption = Annotated[
    bool,
    typer.Option("--budget", help="Trees as large as pays on this machine, up to --nodes; measured at the first use."),
]
CompileOption = Annotated[
    bool,
    typer.Option("--compile", help="Compile the target's steps first: takes 10 to 60 s, needs a C++ compiler."),
]
AlsoOption = Annotated[
    str, typer.Option("--also", help="transformers' own generate beside it: hf,hf-compiled,hf-lookup,hf-assisted=DIR.")
]
NewTokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Prompts decoded together.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.", show_default="PyTorch's")]
TemplateOption = Annotated[
    Path | None, typer.Option("--chat-template", help="Jinja file in place of the tokenizer's chat template.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="First prompts only.", show_default="all")]
SomeOption = Annotated[
    int | None,
    typer.Option("--limit", min=1, help="Prompts of each task, evenly from all of its file.", show_default="all"),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]


def meta(target: str | None, drafter: str | None) -> dict[str, Any]:
    """What a results file says of the command that wrote it."""
    return {
        "command": shlex.join(["ctc-drafter", *sys.argv[1:]]),
        "target": target or "shipped",
        "drafter": drafter or "shipped",
    }


def refuse(message: str) -> NoReturn:
    from ctc_drafter.types import UserError

    raise UserError(message)
