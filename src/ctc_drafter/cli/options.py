"""Command-line options that several commands share."""

from __future__ import annotations

import difflib
import inspect
import os
import shlex
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, get_args

import typer

if TYPE_CHECKING:
    from ctc_drafter.decode.batch import Nodes

Dtype = Literal["float32", "bfloat16", "float16"]
AutoDtype = Literal["auto", "float32", "bfloat16", "float16"]

TargetOption = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="Target model: local folder (of a LoRA adapter, too), GGUF file, Hugging Face id, smollm2 or tiny. "
        "Default: smollm2 where it is installed, else tiny.",
    ),
]
RevisionOption = Annotated[
    str | None,
    typer.Option(
        "--revision", help="Branch, tag or commit of a target that is a Hugging Face id.", show_default="main"
    ),
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run the Python code that the target's folder or repository brings along."
    ),
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        help="Local folder or Hugging Face id of the tokenizer, where the target's folder has none.",
        show_default="the target's",
    ),
]
DrafterOption = Annotated[
    str | None,
    typer.Option(
        "--drafter",
        help="Drafter for the target: local folder, Hugging Face id or prompt_lookup. "
        "Default: the one that ships for smollm2 and tiny, prompt_lookup for other targets.",
    ),
]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Floating-point type of target and drafter.")]
AutoDtypeOption = Annotated[
    AutoDtype,
    typer.Option(
        "--dtype",
        help="Floating-point type of target and drafter; auto is the checkpoint's, but float32 on a CPU that is not "
        "faster in bfloat16.",
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        help="Device of PyTorch: cpu, cuda, cuda:1, mps, ...; auto uses CUDA if it is available.",
    ),
]
AttnOption = Annotated[
    Literal["sdpa", "eager"] | None,
    typer.Option("--attn", help="Attention kernel of the target.", show_default="the model's"),
]
FourBitOption = Annotated[
    bool, typer.Option("--load-in-4bit", help="Quantise the target to 4 bits while it loads (bitsandbytes).")
]
EightBitOption = Annotated[
    bool, typer.Option("--load-in-8bit", help="Quantise the target to 8 bits while it loads (bitsandbytes).")
]
TemplateArgOption = Annotated[
    list[str] | None,
    typer.Option(
        "--chat-template-arg",
        help="Variable of the chat template as NAME=VALUE, such as enable_thinking=false; may be repeated.",
    ),
]
NodesOption = Annotated[
    int | None,
    typer.Option(
        "--nodes",
        min=1,
        help="Largest number of drafted tokens that one step verifies (nodes of the token tree).",
        show_default="16",
    ),
]
TreesOption = Annotated[
    str | None,
    typer.Option(
        "--nodes",
        metavar="<n|auto>",
        help="Largest number of drafted tokens that one step verifies (nodes of the token tree); auto chooses it for "
        "each step, none included, from step times that are measured on this machine at first use, for some seconds.",
        show_default="auto",
    ),
]
FloorOption = Annotated[
    float | None,
    typer.Option("--floor", min=0.0, max=0.99, help="Minimum probability of a drafted prefix.", show_default="0.02"),
]
ChosenFloorOption = Annotated[
    float | None,
    typer.Option(
        "--floor",
        min=0.0,
        max=0.99,
        help="Minimum probability of a drafted prefix.",
        show_default="what step times say; 0.02 with a number of --nodes",
    ),
]
BudgetOption = Annotated[
    bool,
    typer.Option(
        "--budget", help="Choose the tree size of each step as with --nodes auto, up to the number that --nodes names."
    ),
]
CompileOption = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile the target's decoding steps first (torch.compile). On a CPU a minute or so at first, for "
        "one layer, and seconds from then on; needs a C++ compiler.",
    ),
]
ExactOption = Annotated[
    bool,
    typer.Option(
        "--exact",
        help="Compute steps so that drafting changes no bit, in bfloat16 too; tried at loading. float32 needs it less.",
    ),
]
OpenVINOOption = Annotated[
    Literal["f32", "int8"] | None,
    typer.Option(
        "--openvino",
        help="Compute the target in OpenVINO on the CPU, with weights of this type. int8 is the fastest; such a target "
        "is another one, and drafts do not change what its own plain decoding writes.",
        show_default="PyTorch",
    ),
]
AlsoOption = Annotated[
    str,
    typer.Option(
        "--also",
        help="Also measure transformers' generate or other engines, comma-separated: "
        "hf,hf-compiled,hf-lookup,hf-assisted=DIR,llama.cpp,openvino. "
        "llama.cpp:q8_0:lookup=FILE has another type of weights, a speculative mode and a GGUF file.",
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
TemperatureOption = Annotated[
    float | None,
    typer.Option(
        "--temperature", min=0.0, help="Sampling temperature; 0 decodes greedily.", show_default="the model's"
    ),
]
TopPOption = Annotated[
    float | None, typer.Option("--top-p", help="Nucleus sampling threshold.", show_default="the model's")
]
TopKOption = Annotated[
    int | None,
    typer.Option(
        "--top-k",
        min=0,
        help="Sample from the k most probable tokens only; 0 for all.",
        show_default="the model's",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Random seed.")]


def tree_nodes(text: str | None) -> Nodes:
    """What `--nodes` says of the size of trees, `auto` unless it is given. Raises `UserError` for what is no size."""
    if text is None or text == "auto":
        return "auto"
    if not (text.isdecimal() and int(text) > 0):
        refuse(f"--nodes {text} is no size; give a number from 1, or auto")
    return int(text)


def arguments(command: Callable[..., None], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a command's options by their long names (`draft_layers`) as arguments of its function.

    None and False leave an option out, as on a command line, where its environment variable counts then. Raises
    `UserError` for an option that the command does not have, for a value of another type or out of range, and where
    one is missing.
    """
    from pydantic import Field, TypeAdapter, ValidationError

    name, known, missing = command.__name__, {}, set()
    found: dict[str, Any] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        kind, option = get_args(parameter.annotation)
        long = option.default.partition("/")[0].removeprefix("--").replace("-", "_")  # typer keeps the names there
        known[long] = parameter.name, Annotated[kind, Field(ge=option.min, le=option.max)]
        if parameter.default is parameter.empty:
            missing.add(long)
        if option.envvar and option.envvar in os.environ:
            found[parameter.name] = os.environ[option.envvar]
    for long, value in values.items():
        if long not in known:
            refuse(f"{name} has no option {long}; it has {', '.join(known)}")
        if value is None or value is False:
            continue
        place, kind = known[long]
        try:
            found[place] = TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            refuse(f"{name}: {long} is {value}: {error.errors()[0]['msg']}")
        missing.discard(long)
    if missing:
        refuse(f"{name} needs {', '.join(sorted(missing))}")
    return found


def read_settings(context: typer.Context, path: Path | None) -> Path | None:
    """Takes the settings of a YAML or TOML file as defaults of the command's options: what the command line or a
    variable says comes first. Keys are the options' names. Raises `UserError` for a key that is none."""
    if path is None:
        return None
    known = {option.removeprefix("--"): each for each in context.command.params for option in each.opts}
    settings: dict[str, Any] = {}
    for key, value in settings_of(path).items():
        name = str(key).replace("_", "-")
        if name not in known or name == "config":
            near = difflib.get_close_matches(name, known, 1)
            refuse(f"{path}: unknown key {key}" + (f"; did you mean {near[0]}?" if near else "; see serve --help"))
        several = getattr(known[name], "multiple", False)
        values = value if isinstance(value, list) and several else [value]
        if not all(isinstance(each, str | int | float | bool) for each in values):
            refuse(f"{path}: {key} has a value that no option takes; give a text, a number, true or false")
        settings[known[name].name or name] = values if several else value
    context.default_map = settings
    return path


def settings_of(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            found: Any = tomllib.loads(text)
        else:
            import yaml

            found = yaml.safe_load(text) or {}
    except (OSError, ValueError) as error:
        refuse(f"{path} cannot be read: {' '.join(str(error).split())}")
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "yaml":
            raise
        refuse(f"{path} is no YAML: {' '.join(str(error).split())}")
    if not isinstance(found, dict):
        refuse(f"{path} holds no settings; write one a line, such as port: 8000")
    return found


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        is_eager=True,
        callback=read_settings,
        help="YAML or TOML file of these options, by their names; CTC_DRAFTER_* variables and options come first.",
    ),
]


def meta(target: str, drafter: str | None) -> dict[str, Any]:
    """Metadata of a results file: command line, target and drafter."""
    return {"command": shlex.join(["ctc-drafter", *sys.argv[1:]]), "target": target, "drafter": drafter}


def refuse(message: str) -> NoReturn:
    from ctc_drafter.types import UserError

    raise UserError(message)
