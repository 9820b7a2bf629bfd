"""Command-line options that several commands share."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

Dtype = Literal["float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]

TargetOption = Annotated[
    str | None,
    typer.Option("--target", help="Target model: local folder or Hugging Face id. Default: the shipped one."),
]
DrafterOption = Annotated[
    str | None,
    typer.Option(
        "--drafter",
        help="Drafter for the target: local folder, Hugging Face id or prompt_lookup. Default: the shipped one.",
    ),
]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Floating-point type of target and drafter.")]
DeviceOption = Annotated[Device, typer.Option("--device", help="Device; auto uses CUDA if it is available.")]
NodesOption = Annotated[
    int | None,
    typer.Option(
        "--nodes",
        min=1,
        help="Largest number of drafted tokens that one step verifies (nodes of the token tree).",
        show_default="16",
    ),
]
FloorOption = Annotated[
    float | None,
    typer.Option("--floor", min=0.0, max=0.99, help="Minimum probability of a drafted prefix.", show_default="0.05"),
]
BudgetOption = Annotated[
    bool,
    typer.Option(
        "--budget",
        help="Choose the tree size of each step, up to --nodes, from step times measured on this machine at first use.",
    ),
]
CompileOption = Annotated[
    bool,
    typer.Option(
        "--compile", help="Compile the target's decoding steps first (torch.compile): 10 to 60 s; needs a C++ compiler."
    ),
]
AlsoOption = Annotated[
    str,
    typer.Option(
        "--also", help="Also measure transformers' generate, comma-separated: hf,hf-compiled,hf-lookup,hf-assisted=DIR."
    ),
]
NewTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Maximum number of new tokens per answer.")
]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Prompts decoded in one batch.")]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="Number of CPU threads.", show_default="PyTorch's")
]
TemplateOption = Annotated[
    Path | None, typer.Option("--chat-template", help="Jinja chat template that replaces the tokenizer's.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="JSON file for the results.")]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, help="Maximum number of prompts.", show_default="all")
]
SomeOption = Annotated[
    int | None,
    typer.Option(
        "--limit", min=1, help="Maximum number of prompts per task, spread evenly over its file.", show_default="all"
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Random seed.")]


def meta(target: str | None, drafter: str | None) -> dict[str, Any]:
    """Metadata of a results file: command line, target and drafter."""
    return {
        "command": shlex.join(["ctc-drafter", *sys.argv[1:]]),
        "target": target or "shipped",
        "drafter": drafter or "shipped",
    }


def refuse(message: str) -> NoReturn:
    from ctc_drafter.types import UserError

    raise UserError(message)
