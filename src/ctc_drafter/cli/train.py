"""The commands that make a drafter. As in `cli`, the work is imported when it starts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ctc_drafter.cli.options import (
    BatchOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    LimitOption,
    NewTokensOption,
    SeedOption,
    TargetOption,
    TemplateOption,
    refuse,
)

if TYPE_CHECKING:
    from ctc_drafter.train.estimate import Plan
    from ctc_drafter.train.recipe import Recipe

FlopsOption = Annotated[
    float | None,
    typer.Option("--flops", help="Operations per second that estimates reckon with.", show_default="measured"),
]


def distill(
    prompts: Annotated[
        str,
        typer.Option("--prompts", help="File (.jsonl, .jsonl.gz, .json, .txt), folder, or hub:owner/name[:split]."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the answers; the same command resumes it.")],
    target: TargetOption = None,
    pattern: Annotated[str, typer.Option("--pattern", help="Names of the files to read.")] = "*",
    limit: LimitOption = None,
    per_file: Annotated[
        int | None, typer.Option("--per-file", min=1, help="Prompts taken from each file.", show_default="all")
    ] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option("--max-prompt-tokens", min=1, help="Longer prompts are left out.", show_default="any")
    ] = None,
    cuts: Annotated[int, typer.Option("--cuts", min=0, help="Further prompts per row that end in its answer.")] = 0,
    max_new_tokens: NewTokensOption = 256,
    batch_size: BatchOption = 16,
    shard_size: Annotated[int, typer.Option("--shard-size", min=1, help="Answers in a file.")] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="Sample, the wilder the higher; 0 is greedy.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Sample from the likeliest tokens of this mass.")] = 1.0,
    seed: SeedOption = 0,
    chat_template: TemplateOption = None,
    server: Annotated[
        str | None, typer.Option("--server", help="An OpenAI-compatible server that runs the target, http://.../v1.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="What the server calls it.", show_default="--target")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="OPENAI_API_KEY", help="The server's key.", show_envvar=True)
    ] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Requests at a time.")] = 32,
    retries: Annotated[int, typer.Option("--retries", min=0, help="Of a request, with longer and longer pauses.")] = 8,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
) -> None:
    """Lets the target answer prompts: the text that a drafter is trained on."""
    from ctc_drafter.load import load_config, load_target, read_template
    from ctc_drafter.train.data import MANY_CUT, cut_message
    from ctc_drafter.train.distill import Sampling
    from ctc_drafter.train.distill import distill as run_distill
    from ctc_drafter.train.distill_server import Server, distill_remotely
    from ctc_drafter.train.prompts import describe_corpus, read_prompts

    if model and not server:
        refuse("--model is what a server calls the target; give --server as well")
    sampling = Sampling(temperature, top_p, seed)
    lm = None
    if server:
        config, tokenizer, eos = load_config(target)
    else:
        lm, tokenizer = load_target(target, dtype, device)
    read_template(tokenizer, chat_template)
    found = read_prompts(
        prompts,
        tokenizer,
        pattern=pattern,
        limit=limit,
        per_file=per_file,
        max_prompt_tokens=max_prompt_tokens,
        cuts=cuts,
        seed=seed,
    )
    name = target or "shipped"
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "shard_size": shard_size, "sampling": sampling}
    options["source"] = describe_corpus(prompts)
    if lm is not None:
        done = run_distill(lm, tokenizer, found.prompts, out, batch_size=batch_size, name=name, **options)
    else:
        where = Server(server or "", model or name, api_key, concurrency, retries)
        done = distill_remotely(where, config, tokenizer, found.prompts, out, eos=eos, name=name, **options)
    left_out = "".join(f", {count} were left out ({reason})" for reason, count in done.left_out.items())
    print(
        f"{out}: {done.rows} answers with {done.tokens} tokens in {done.seconds:.0f} s, {done.found} were there, "
        f"{done.too_long} prompts were too long{left_out}"
    )
    if done.rows and done.cut > MANY_CUT * done.rows:
        show_warning(cut_message(done.cut / done.rows))


def train(
    data: Annotated[list[Path], typer.Option("--data", help="Folder that distill wrote; may be repeated.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the drafter; the same command resumes it.")],
    target: TargetOption = None,
    method: Annotated[
        str,
        typer.Option("--method", help="ctc, ctc-paper, medusa, hydra, hydra++, dflash, dspark or eagle."),
    ] = "ctc",
    steps: Annotated[int | None, typer.Option("--steps", help="Optimizer steps.", show_default="by --epochs")] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="Passes over the data.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", help="Peak learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Rows of a forward pass.")] = None,
    anchors: Annotated[int | None, typer.Option("--anchors", help="Positions of a row that a step learns.")] = None,
    loss: Annotated[
        Literal["prefix", "ctc", "teacher"] | None,
        typer.Option(
            "--loss", help="Prefix, full-sequence CTC, or the target's own probabilities.", show_default="the method's"
        ),
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="bfloat16 autocast.")] = False,
    seed: SeedOption = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE of any other training setting; may be repeated.")
    ] = None,
    frames: Annotated[int | None, typer.Option("--frames", help="CTC frames of a pass.")] = None,
    draft_length: Annotated[
        int | None, typer.Option("--draft-length", help="Longest draft, at most the frames.")
    ] = None,
    draft_layers: Annotated[int | None, typer.Option("--draft-layers", help="Layers of the drafter.")] = None,
    predictor_rank: Annotated[int | None, typer.Option("--predictor-rank", help="Of its bias; 0 for none.")] = None,
    carry: Annotated[
        bool | None, typer.Option("--carry/--no-carry", help="Feeds the newest token's state into the block.")
    ] = None,
    copies: Annotated[
        int | None,
        typer.Option(
            "--copies",
            help="Longest agreement with the text that counts for copies; 0: none.",
            show_default="16 for ctc",
        ),
    ] = None,
    lookup: Annotated[
        int | None,
        typer.Option(
            "--lookup", help="Most tokens to copy without asking the network; 0: none.", show_default="15 for ctc"
        ),
    ] = None,
    draft_vocabulary: Annotated[
        int | None,
        typer.Option("--draft-vocabulary", help="Drafts only that many tokens, the most frequent.", show_default="all"),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            "--init", help="Drafter to start from: of ours, DFlash's, or Medusa's heads.", show_default="none"
        ),
    ] = None,
    max_length: Annotated[int | None, typer.Option("--max-length", min=2, help="Longer rows lose their end.")] = None,
    chat_template: TemplateOption = None,
    held_out: Annotated[float, typer.Option("--held-out", min=0.0, max=0.5, help="Share of rows for β.")] = 0.02,
    features: Annotated[
        Literal["online", "cached"] | None,
        typer.Option(
            "--features", help="The target's: computed at each step, or once, into files.", show_default="online"
        ),
    ] = None,
    features_limit: Annotated[
        float | None, typer.Option("--features-limit", help="GB that these files may take.", show_default="the disk")
    ] = None,
    shard_target: Annotated[
        bool, typer.Option("--shard-target", help="Processes share the target's layers (FSDP2).")
    ] = False,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", help="Repository of the hub, owner/name, for the finished drafter.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Nobody else sees that repository.")] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Only say what disk, memory and time the training needs.")
    ] = False,
    flops: FlopsOption = None,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Go on from the newest checkpoint.")] = True,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
) -> None:
    """Trains a drafter for the target on its own answers."""
    import shlex

    from ctc_drafter.drafters.registry import trained_method
    from ctc_drafter.drafters.warm_start import read_start
    from ctc_drafter.evaluate.figures import save_learning_curves
    from ctc_drafter.train.publish import TrainJob, train_for_target
    from ctc_drafter.train.settings import TrainSettings

    named: dict[str, Any] = {"steps": steps, "epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size}
    named |= {"anchors": anchors, "loss": loss, "bf16": bf16 or None, "seed": seed}
    named |= {"features": features, "features_limit": features_limit}
    given = pairs(settings or []) | {k: v for k, v in named.items() if v is not None}
    chosen = TrainSettings.parse(trained_method(method).training | given)
    sizes: dict[str, Any] = {"frames": frames, "draft_length": draft_length, "num_hidden_layers": draft_layers}
    sizes |= {"predictor_rank": predictor_rank, "draft_vocab_size": draft_vocabulary, "carry": carry}
    sizes |= {"copies": copies, "lookup_length": lookup}
    job = TrainJob(
        data=data,
        out=out,
        settings=chosen,
        target=target,
        method=method,
        sizes=sizes,
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
    file: Annotated[Path, typer.Argument(help="YAML file; `recipes/` holds some.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for answers and drafter.")] = Path("runs/recipe"),
    target: Annotated[str | None, typer.Option("--target", help="In place of the recipe's.")] = None,
    dtype: Annotated[Dtype | None, typer.Option("--dtype", help="In place of the recipe's.")] = None,
    prompts: Annotated[str | None, typer.Option("--prompts", help="In place of the recipe's.")] = None,
    server: Annotated[
        str | None, typer.Option("--server", help="That runs the target and answers the prompts.")
    ] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Only say what disk, memory and time the training needs.")
    ] = False,
    flops: FlopsOption = None,
    bandwidth: Annotated[
        float | None,
        typer.Option("--bandwidth", help="Bytes per second that estimates reckon with.", show_default="measured"),
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Runs the distillation and the training of a recipe, and prints their commands."""
    import shlex

    from ctc_drafter.train.recipe import commands, read_recipe

    found = read_recipe(file)
    found = found.model_copy(update={key: value for key, value in (("target", target), ("dtype", dtype)) if value})
    if estimate:
        show_recipe(found, flops, bandwidth, device)
        return
    own = {"prompts": prompts, "server": server}
    stages = commands(found, out, distill=found.distill | {k: v for k, v in own.items() if v})
    app = typer.Typer(pretty_exceptions_enable=False)
    for command in (distill, train):
        app.command()(command)
    for line in stages:
        print(shlex.join(["ctc-drafter", *line]), flush=True)
        app(args=[*line, "--device", device], prog_name="ctc-drafter", standalone_mode=False)


def show_warning(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def pairs(settings: list[str]) -> dict[str, Any]:
    """NAME=VALUE texts as a dictionary; commas make a list."""
    found: dict[str, Any] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals:
            refuse(f"--set {text} has no value; write NAME=VALUE")
        found[name.strip().replace("-", "_")] = value.split(",") if "," in value else value
    return found


# What `--estimate` prints. As in `cli`, the work is imported when it starts.


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


def show_recipe(recipe: Recipe, flops: float | None, bandwidth: float | None, device: str) -> None:
    """As `show_estimate`, and what the answers cost; bandwidth: bytes per second, measured if not given."""
    from ctc_drafter.load import chosen_device
    from ctc_drafter.train.estimate import measured_bandwidth
    from ctc_drafter.train.recipe import distillation, plan_of

    rate = show_estimate(plan_of(recipe), flops, device)
    speed = bandwidth or measured_bandwidth(chosen_device(device))
    source = "given" if flops and bandwidth else "measured here where not given"
    for what, much in distillation(recipe, rate, speed, source):
        print(f"{what}: {much}")
