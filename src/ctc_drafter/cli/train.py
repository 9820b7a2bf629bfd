"""`ctc-drafter train` and `recipe`: from distilled answers to a trained drafter."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctc_drafter.cli.distill import distill, show_warning
from ctc_drafter.cli.options import (
    DeviceOption,
    Dtype,
    DtypeOption,
    RevisionOption,
    SeedOption,
    TargetOption,
    TemplateOption,
    TokenizerOption,
    TrustOption,
    arguments,
    refuse,
)
from ctc_drafter.cli.sizes import (
    JointRank,
    JointTokens,
    PredictorRank,
    PredictorTied,
    PredictorWidth,
    check_sizes,
    sizes_by_option,
)
from ctc_drafter.train.settings import TrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ctc_drafter.train.estimate import Plan
    from ctc_drafter.train.recipe import Recipe

FlopsOption = Annotated[
    float | None,
    typer.Option(
        "--flops", help="Floating-point operations per second assumed by --estimate.", show_default="measured"
    ),
]


# Training settings with an option of their own; `--set` takes the others.
NAMED = ("steps", "epochs", "learning_rate", "batch_size", "anchors", "loss", "bf16", "features", "features_limit")
SHOWN = {"loss": "the method's", "steps": "by --epochs", "features_limit": "the disk"}  # in place of the default
SWITCHES = {name for name in NAMED if TrainSettings.model_fields[name].annotation is bool}


def setting_option(name: str) -> inspect.Parameter:
    """The option of a training setting, as `TrainSettings` declares it. Its value is None where it is not given, and
    False for a switch: defaults and bounds are `TrainSettings.parse`'s."""
    field = TrainSettings.model_fields[name]
    said = field.description or ""
    shown = False if name in SWITCHES else SHOWN.get(name, str(field.default))
    text = f"{said[0].upper()}{said[1:]}."
    option = typer.Option(f"--{name.replace('_', '-')}", help=text, show_default=shown)
    kind: Any = field.annotation
    kind, unset = (bool, False) if name in SWITCHES else (kind | None, None)
    return inspect.Parameter(
        name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=unset, annotation=Annotated[kind, option]
    )


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of `NAMED` for its `**named`, behind `--method`; typer reads the signature."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "named"]
    place = 1 + [p.name for p in own].index("method")
    both = [*own[:place], *map(setting_option, NAMED), *own[place:]]
    command.__signature__ = inspect.Signature(both)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in both}
    return command


@with_settings
def train(
    data: Annotated[list[Path], typer.Option("--data", help="Output folder of distill; may be repeated.")],
    out: Annotated[Path, typer.Option("--out", help="Output folder of the drafter; the same command resumes it.")],
    target: TargetOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    tokenizer: TokenizerOption = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="Drafting method: ctc, ctc-paper, medusa, hydra, hydra++, dflash, dflash2, dspark or eagle.",
        ),
    ] = "ctc",
    seed: SeedOption = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any other training setting as NAME=VALUE; may be repeated.")
    ] = None,
    frames: Annotated[
        int | None, typer.Option("--frames", help="CTC frames per draft.", show_default="the method's")
    ] = None,
    draft_length: Annotated[
        int | None,
        typer.Option(
            "--draft-length", help="Maximum draft length in tokens, at most --frames.", show_default="the method's"
        ),
    ] = None,
    draft_layers: Annotated[
        int | None, typer.Option("--draft-layers", help="Decoder layers of the drafter.", show_default="the method's")
    ] = None,
    predictor_rank: PredictorRank = None,
    predictor_width: PredictorWidth = None,
    predictor_tied: PredictorTied = None,
    joint_tokens: JointTokens = None,
    joint_rank: JointRank = None,
    carry: Annotated[
        bool | None,
        typer.Option(
            "--carry/--no-carry",
            help="Add the newest token's features to every input of the block.",
            show_default="the method's",
        ),
    ] = None,
    carry_rank: Annotated[
        int | None,
        typer.Option(
            "--carry-rank",
            help="Rank of what each place of the block adds by itself with --carry; 0 for nothing.",
            show_default="the method's",
        ),
    ] = None,
    carry_root: Annotated[
        bool | None,
        typer.Option(
            "--carry-root/--no-carry-root",
            help="Add the last accepted token's embedding to every input of the block, too.",
            show_default="the method's",
        ),
    ] = None,
    convolution: Annotated[
        bool | None,
        typer.Option(
            "--convolution/--no-convolution",
            help="Mix neighbouring places of the block by two-tap convolutions.",
            show_default="the method's",
        ),
    ] = None,
    copies: Annotated[
        int | None,
        typer.Option(
            "--copies",
            help="Longest match with the text that weighs copied tokens in the search; 0 for no copies.",
            show_default="16 for ctc",
        ),
    ] = None,
    lookup: Annotated[
        int | None,
        typer.Option(
            "--lookup",
            help="Maximum tokens drafted by prompt lookup without the network; 0 to disable.",
            show_default="15 for ctc",
        ),
    ] = None,
    draft_vocabulary: Annotated[
        int | None,
        typer.Option(
            "--draft-vocabulary", help="Size of the draft vocabulary: the most frequent tokens.", show_default="all"
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option("--init", help="Checkpoint to start from: ours, DFlash's or Medusa's.", show_default="none"),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", min=2, help="Truncate rows to this many tokens.", show_default="no limit"),
    ] = None,
    chat_template: TemplateOption = None,
    held_out: Annotated[
        float, typer.Option("--held-out", min=0.0, max=0.5, help="Share of rows held out for validation.")
    ] = 0.02,
    shard_target: Annotated[
        bool, typer.Option("--shard-target", help="Shard the target's layers over the processes (FSDP2).")
    ] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option("--push-to-hub", help="Hugging Face repository, owner/name, to upload the finished drafter to."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create the --push-to-hub repository as private.")] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Print the disk, memory and time that training needs, and exit.")
    ] = False,
    flops: FlopsOption = None,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Resume from the newest checkpoint.")] = True,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    **named: Any,
) -> None:
    """Trains a drafter on the target's answers."""
    import shlex

    from ctc_drafter.drafters.registry import sizes_without_carry, trained_method
    from ctc_drafter.drafters.warm_start import read_start
    from ctc_drafter.evaluate.figures import save_learning_curves
    from ctc_drafter.train.publish import TrainJob, train_for_target

    if ":" in device:
        refuse(f"training takes the first GPU that it sees; instead of --device {device} set CUDA_VISIBLE_DEVICES")
    given = pairs(settings or []) | {"seed": seed}
    given |= {name: value for name, value in named.items() if value is not (False if name in SWITCHES else None)}
    chosen = TrainSettings.parse(trained_method(method).training | given)
    sizes: dict[str, Any] = {"frames": frames, "draft_length": draft_length, "num_hidden_layers": draft_layers}
    sizes |= {"predictor_rank": predictor_rank, "draft_vocab_size": draft_vocabulary, "carry": carry}
    sizes |= {
        "predictor_width": predictor_width,
        "predictor_tied": predictor_tied,
        "joint_tokens": joint_tokens,
        "joint_rank": joint_rank,
        "carry_rank": carry_rank,
        "carry_root": carry_root,
        "convolution": convolution,
        "copies": copies,
        "lookup_length": lookup,
    }
    check_sizes(method, sizes)
    job = TrainJob(
        data=data,
        out=out,
        settings=chosen,
        target=target,
        revision=revision,
        trust_remote_code=trust_remote_code,
        tokenizer=tokenizer,
        method=method,
        sizes=sizes_without_carry(sizes),
        start=read_start(init) if init else None,
        max_length=max_length,
        chat_template=chat_template,
        held_out=held_out,
        shard_target=shard_target,
        push_to_hub=push_to_hub,
        private=private,
        resume=resume,
        dtype=dtype,
        device=device,
        command=shlex.join(["ctc-drafter", *sys.argv[1:]]),
    )
    with sizes_by_option():
        if estimate:
            show_estimate(job.plan(job.rows()[0]), flops, device)
            return
        done = train_for_target(job, save_learning_curves, show_warning)
    if done is None:
        return
    trained = done.trained
    if done.address:
        print(done.address)
    figures = {
        key: value for entry in trained.history for key, value in entry.items() if "loss" in key or "beta" in key
    }
    print(f"{out}: {trained.steps} steps; " + ", ".join(f"{key} {value:.3f}" for key, value in figures.items()))


def recipe(
    name: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="Name of a recipe (see --list), or a YAML file.")
    ] = None,
    listed: Annotated[
        bool, typer.Option("--list", help="List the recipes that come with the package, and exit.")
    ] = False,
    out: Annotated[Path, typer.Option("--out", help="Output folder of answers and drafter.")] = Path("runs/recipe"),
    target: Annotated[str | None, typer.Option("--target", help="Target that replaces the recipe's.")] = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    tokenizer: TokenizerOption = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Floating-point type that replaces the recipe's.")
    ] = None,
    prompts: Annotated[str | None, typer.Option("--prompts", help="Prompts that replace the recipe's.")] = None,
    answers: Annotated[
        Path | None,
        typer.Option("--answers", help="Train on answers that were distilled before: a folder of distill's folders."),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option("--server", help="URL of an OpenAI-compatible server that runs the target, for distillation."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands, and exit.")] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Print the disk, memory and time that training needs, and exit.")
    ] = False,
    flops: FlopsOption = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(
            "--bandwidth", help="Memory bandwidth in bytes per second assumed by --estimate.", show_default="measured"
        ),
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Runs distillation and training of a recipe, and prints both commands."""
    import shlex

    from ctc_drafter.load import load_config
    from ctc_drafter.train.recipe import command_lines, find_recipe, packaged_recipes, plan_of, read_recipe, stages

    if listed:
        for each, place in packaged_recipes().items():
            print(f"{each:20} {read_recipe(place).target}")
        return
    if name is None:
        refuse(f"which recipe? Give a YAML file, or one of {', '.join(packaged_recipes())}")
    found = read_recipe(find_recipe(name))
    config = None
    if target:  # with a chat template of its own
        found = found.model_copy(update={"target": target, "revision": None, "chat_template": None})
        config = load_config(target, revision, trust_remote_code, tokenizer)[0] if estimate else None
    given = {"revision": revision, "dtype": dtype}
    found = found.model_copy(update={key: value for key, value in given.items() if value})
    if answers and (prompts or server):
        refuse("--answers are there already; leave out --prompts and --server")
    if estimate and answers:
        show_estimate(plan_of(found, config), flops, device)
        return
    if estimate:
        show_recipe(found, flops, bandwidth, device, config)
        return
    both = {"trust_remote_code": trust_remote_code, "tokenizer": tokenizer}
    own = {"prompts": prompts, "server": server, **both}
    parts = stages(found, out, {name: value for name, value in own.items() if value}, answers)
    parts[-1][1].update({name: value for name, value in both.items() if value})
    training = dict(parts[-1][1])
    others = TrainSettings.known(training.pop("set", None) or {})
    training = others | arguments(train, training)
    # A fault shows before hours of distillation.
    TrainSettings.parse({name: value for name, value in training.items() if name in TrainSettings.model_fields})
    distilling = [arguments(distill, values) for _, values in parts[:-1]]
    lines = [shlex.join(["ctc-drafter", *line]) for line in command_lines(parts)]
    if dry_run:
        print("\n".join(lines))
        return
    for line, values in zip(lines[:-1], distilling, strict=True):
        print(line, flush=True)
        distill(**values, device=device)
    print(lines[-1], flush=True)
    train(**training, device=device)


def pairs(settings: list[str]) -> dict[str, Any]:
    """NAME=VALUE texts as a dictionary; commas make a list."""
    found: dict[str, Any] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals:
            refuse(f"--set {text} has no value; write NAME=VALUE")
        found[name.strip().replace("-", "_")] = value.split(",") if "," in value else value
    return found


# Output of `--estimate`.


def show_estimate(plan: Plan, flops: float | None, device: str) -> float:
    """Prints what a run needs; returns the rate, operations per second: the one given, or this machine's."""
    from ctc_drafter.load import chosen_device, keep_quiet
    from ctc_drafter.train.estimate import describe, estimate, measured_rate

    keep_quiet()
    rate, source = flops, "given"
    if rate is None:
        rate, source = measured_rate(plan.dtype, chosen_device(device)), "measured here: matrix products"
    for what, much in describe(estimate(plan), rate, source):
        print(f"{what}: {much}")
    return rate


def show_recipe(
    recipe: Recipe,
    flops: float | None,
    bandwidth: float | None,
    device: str,
    config: PreTrainedConfig | None = None,
) -> None:
    """As `show_estimate`, with the cost of the distillation; bandwidth: bytes per second, measured if not given.
    config: of another target than the recipe's."""
    from ctc_drafter.load import chosen_device
    from ctc_drafter.train.estimate import measured_bandwidth
    from ctc_drafter.train.recipe import distillation, plan_of

    rate = show_estimate(plan_of(recipe, config), flops, device)
    speed = bandwidth or measured_bandwidth(chosen_device(device))
    source = "given" if flops and bandwidth else "measured here where not given"
    for what, much in distillation(recipe, rate, speed, source, config):
        print(f"{what}: {much}")
