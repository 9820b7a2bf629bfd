"""`ctc-drafter distill`, `train` and `recipe`: from prompts to a trained drafter."""

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
    typer.Option(
        "--flops", help="Floating-point operations per second assumed by --estimate.", show_default="measured"
    ),
]


def distill(
    prompts: Annotated[
        str,
        typer.Option(
            "--prompts", help="Prompts: file (.jsonl, .jsonl.gz, .json, .txt), folder, or hub:owner/name[:split]."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Output folder of the answers; the same command resumes it.")],
    target: TargetOption = None,
    pattern: Annotated[str, typer.Option("--pattern", help="Glob pattern of the files to read.")] = "*",
    limit: LimitOption = None,
    per_file: Annotated[
        int | None, typer.Option("--per-file", min=1, help="Maximum number of prompts per file.", show_default="all")
    ] = None,
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option("--max-prompt-tokens", min=1, help="Skip prompts longer than this.", show_default="any"),
    ] = None,
    cuts: Annotated[
        int, typer.Option("--cuts", min=0, help="Extra prompts per conversation that end within its answer.")
    ] = 0,
    max_new_tokens: NewTokensOption = 256,
    batch_size: BatchOption = 16,
    shard_size: Annotated[int, typer.Option("--shard-size", min=1, help="Answers per output file.")] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="Sampling temperature; 0 decodes greedily.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Nucleus sampling threshold.")] = 1.0,
    seed: SeedOption = 0,
    chat_template: TemplateOption = None,
    server: Annotated[
        str | None,
        typer.Option("--server", help="URL of an OpenAI-compatible server that runs the target, http://.../v1."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Model name of the target on the server.", show_default="--target")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="OPENAI_API_KEY", help="API key of the server.", show_envvar=True)
    ] = None,
    concurrency: Annotated[
        int, typer.Option("--concurrency", min=1, help="Maximum number of concurrent requests.")
    ] = 32,
    retries: Annotated[
        int, typer.Option("--retries", min=0, help="Retries per request, with exponential backoff.")
    ] = 8,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
) -> None:
    """Generates the target's answers to prompts, which drafters are trained on."""
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
    data: Annotated[list[Path], typer.Option("--data", help="Output folder of distill; may be repeated.")],
    out: Annotated[Path, typer.Option("--out", help="Output folder of the drafter; the same command resumes it.")],
    target: TargetOption = None,
    method: Annotated[
        str,
        typer.Option(
            "--method", help="Drafting method: ctc, ctc-paper, medusa, hydra, hydra++, dflash, dspark or eagle."
        ),
    ] = "ctc",
    steps: Annotated[
        int | None, typer.Option("--steps", help="Optimizer steps; overrides --epochs.", show_default="by --epochs")
    ] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="Passes over the training data.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Peak of the cosine learning rate schedule.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Rows per forward pass.")] = None,
    anchors: Annotated[
        int | None, typer.Option("--anchors", help="Positions of each row whose continuations are trained per step.")
    ] = None,
    loss: Annotated[
        Literal["prefix", "ctc", "teacher"] | None,
        typer.Option(
            "--loss",
            help="Prefix likelihood, full-sequence CTC, or the target's probabilities.",
            show_default="the method's",
        ),
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Train under bfloat16 autocast.")] = False,
    seed: SeedOption = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any other training setting as NAME=VALUE; may be repeated.")
    ] = None,
    frames: Annotated[int | None, typer.Option("--frames", help="CTC frames per draft.")] = None,
    draft_length: Annotated[
        int | None, typer.Option("--draft-length", help="Maximum draft length in tokens, at most --frames.")
    ] = None,
    draft_layers: Annotated[int | None, typer.Option("--draft-layers", help="Decoder layers of the drafter.")] = None,
    predictor_rank: Annotated[
        int | None, typer.Option("--predictor-rank", help="Rank of the predictor's low-rank bias; 0 for no predictor.")
    ] = None,
    carry: Annotated[
        bool | None,
        typer.Option("--carry/--no-carry", help="Add the newest token's features to every input of the block."),
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
        int | None, typer.Option("--max-length", min=2, help="Truncate rows to this many tokens.")
    ] = None,
    chat_template: TemplateOption = None,
    held_out: Annotated[
        float, typer.Option("--held-out", min=0.0, max=0.5, help="Share of rows held out for validation.")
    ] = 0.02,
    features: Annotated[
        Literal["online", "cached"] | None,
        typer.Option(
            "--features", help="Target features: computed at every step, or cached in files.", show_default="online"
        ),
    ] = None,
    features_limit: Annotated[
        float | None,
        typer.Option("--features-limit", help="Disk limit of the feature cache in GB.", show_default="the disk"),
    ] = None,
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
) -> None:
    """Trains a drafter on the target's answers."""
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
    file: Annotated[Path, typer.Argument(help="YAML recipe; see the folder recipes/.")],
    out: Annotated[Path, typer.Option("--out", help="Output folder of answers and drafter.")] = Path("runs/recipe"),
    target: Annotated[str | None, typer.Option("--target", help="Target that replaces the recipe's.")] = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Floating-point type that replaces the recipe's.")
    ] = None,
    prompts: Annotated[str | None, typer.Option("--prompts", help="Prompts that replace the recipe's.")] = None,
    server: Annotated[
        str | None,
        typer.Option("--server", help="URL of an OpenAI-compatible server that runs the target, for distillation."),
    ] = None,
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


def show_recipe(recipe: Recipe, flops: float | None, bandwidth: float | None, device: str) -> None:
    """As `show_estimate`, with the cost of the distillation; bandwidth: bytes per second, measured if not given."""
    from ctc_drafter.load import chosen_device
    from ctc_drafter.train.estimate import measured_bandwidth
    from ctc_drafter.train.recipe import distillation, plan_of

    rate = show_estimate(plan_of(recipe), flops, device)
    speed = bandwidth or measured_bandwidth(chosen_device(device))
    source = "given" if flops and bandwidth else "measured here where not given"
    for what, much in distillation(recipe, rate, speed, source):
        print(f"{what}: {much}")
