"""The `ctc-drafter` command line: demo, generate, serve, export. Heavy modules are imported when a command runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ctc_drafter.cli.bench import bench, report
from ctc_drafter.cli.chat import chat
from ctc_drafter.cli.distill import distill
from ctc_drafter.cli.evaluate import evaluate, exactness, profile
from ctc_drafter.cli.groups import AnswerOptions, ModelOptions, PlainOption, grouped
from ctc_drafter.cli.help import registered, resumable
from ctc_drafter.cli.options import (
    BatchOption,
    BudgetOption,
    ChosenFloorOption,
    CompileOption,
    ConfigOption,
    DrafterOption,
    DtypeOption,
    ExactOption,
    JsonOption,
    NewTokensOption,
    NodesOption,
    OpenVINOOption,
    RevisionOption,
    TargetOption,
    ThreadsOption,
    TokenizerOption,
    TreesOption,
    TrustOption,
    meta,
    refuse,
    tree_nodes,
)
from ctc_drafter.cli.train import recipe, train

app = typer.Typer(
    help="Lossless speculative decoding with a CTC drafter.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def show_version(wanted: bool) -> None:
    if wanted:
        from ctc_drafter import __version__

        print(f"ctc-drafter {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[  # its callback shows it
        bool, typer.Option("--version", is_eager=True, callback=show_version, help="Show the version, and exit.")
    ] = False,
) -> None:
    pass


@grouped
def demo(model: ModelOptions, max_new_tokens: NewTokensOption = 128, nodes: NodesOption = None) -> None:
    """Decodes three prompts without and with the drafter, and prints the speedup."""
    from rich.console import Console

    from ctc_drafter.cli.demo import demo as run_demo
    from ctc_drafter.decode.batch import DEFAULT_NODES
    from ctc_drafter.load import load_pair

    wanted = model.loading()
    lm, tokenizer, draft = load_pair(*model.names(), wanted)
    assert draft is not None
    console = Console(highlight=False)
    run_demo(lm, draft, tokenizer, console, nodes=nodes or DEFAULT_NODES, max_new_tokens=max_new_tokens)


@grouped
def generate(
    model: ModelOptions,
    answers: AnswerOptions,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Prompt to answer, - for standard input; the answer is streamed.")
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts-file", help="Prompts: .jsonl, .jsonl.gz or .json, or a text file with one prompt per line."
        ),
    ] = None,
    max_new_tokens: NewTokensOption = 256,
    batch_size: BatchOption = 1,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as plain text, without the chat template.")
    ] = False,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="Stop string that ends an answer; may be repeated.")
    ] = None,
    compiled: CompileOption = False,
    exact: ExactOption = False,
    openvino: OpenVINOOption = None,
    json_out: JsonOption = None,
) -> None:
    """Generates the target's answer to a prompt, or to every prompt of a file."""
    from ctc_drafter.cli.answer import Answerer, answer
    from ctc_drafter.decode.sampling import ModelSampling
    from ctc_drafter.evaluate.tasks import Prompt, read_prompts
    from ctc_drafter.files import check_place
    from ctc_drafter.load import load_pair
    from ctc_drafter.steps import Steps

    steps = Steps(compiled, exact, openvino)
    wanted = model.loading(steps)
    if (prompt is None) == (prompts_file is None):
        refuse("give either --prompt or --prompts-file")
    if prompt == "-":
        prompt = read_stdin()
    if prompt is not None and not prompt.strip():
        refuse("the prompt is empty; give some text to --prompt")
    check_place(json_out)
    settings = answers.settings(max_new_tokens, batch_size, raw, stop or ())
    prompts = read_prompts(prompts_file) if prompts_file else (Prompt("prompt", "prompt", (prompt or "",)),)
    names = model.names(answers.plain)
    lm, tokenizer, draft = load_pair(*names, wanted)
    settings = settings.filled(ModelSampling.of(lm.model))
    lm = steps.of(lm, [draft] if draft else [], settings.nodes, batch_size)
    answer(Answerer(lm, draft, tokenizer, settings), prompts, meta(*names), json_out, sys.stdout)


def read_stdin() -> str:
    try:
        return sys.stdin.read().strip()
    except UnicodeDecodeError:
        refuse("standard input is not UTF-8 text")


# Exports a drafter for other engines.


def export(
    out: Annotated[Path, typer.Option("--out", help="Output folder, new or empty.")],
    target: TargetOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    tokenizer_name: TokenizerOption = None,
    drafter: DrafterOption = None,
    layout: Annotated[Literal["speculators"], typer.Option("--format", help="Checkpoint format.")] = "speculators",
    width: Annotated[
        int | None,
        typer.Option(
            "--width",
            min=1,
            help="Beam width of a CTC drafter's search: prefixes of each length that it keeps.",
            show_default="8",
        ),
    ] = None,
    dtype: DtypeOption = "bfloat16",
) -> None:
    """Exports a drafter: ctc for vLLM and SGLang, with our plugin; dflash for vLLM, without it. vllm serve OUT."""
    import torch

    from ctc_drafter.chat import fingerprint
    from ctc_drafter.drafters.ctc import CTCDrafter
    from ctc_drafter.drafters.prompt_lookup import PromptLookup
    from ctc_drafter.drafters.registry import PROMPT_LOOKUP, open_drafter
    from ctc_drafter.drafters.warm_start import is_published
    from ctc_drafter.files import disk_errors
    from ctc_drafter.integrations.export import export as write
    from ctc_drafter.load import drafter_place, load_config, pair
    from ctc_drafter.target.names import resolve

    names = pair(target, drafter)
    config, tokenizer, _ = load_config(names[0], revision, trust_remote_code, tokenizer_name)
    place = str(drafter_place(names[1]))
    if place != PROMPT_LOOKUP and is_published(place):
        refuse(f"{names[1]} is in a format that engines read as it is; export is for what ctc-drafter train writes")
    found = open_drafter(place)
    if isinstance(found, PromptLookup):
        refuse(f"{PROMPT_LOOKUP} has nothing to export; vLLM has its own: --speculative-config with method ngram")
    if width is not None and not isinstance(found, CTCDrafter):
        refuse(f"--width is of a CTC drafter's search, and {names[1]} is another; leave it out")
    found.check_target(config, fingerprint(tokenizer))
    name = resolve(names[0], revision)
    kept = str(Path(name).resolve()) if Path(name).is_dir() else name
    with disk_errors(out):
        left_out = write(found.to(getattr(torch, dtype)), config, kept, out, 8 if width is None else width)
    plugin = "with our plugin" if isinstance(found, CTCDrafter) else "without a plugin"
    tokens = getattr(found, "frames", found.config.draft_length)
    print(f"{out}: {layout}, {tokens} tokens a draft; vllm serve {out} runs it {plugin}")
    if left_out:
        parts = ["copies from the text" if part == "predictor.copying" else part for part in left_out]
        print(f"engines draft without {', '.join(parts)}: expect fewer tokens per step there than here")


@grouped
def serve(
    model: ModelOptions,
    config: ConfigOption = None,  # noqa: ARG001  # its settings are the other options' defaults
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for all interfaces.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 chooses a free one.")
    ] = 8000,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="CTC_DRAFTER_API_KEY", help="API key that clients must send.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host",
            help="Host name that requests may be sent to, besides localhost; may be repeated. * for any.",
            show_default="localhost, or any with another --host",
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-origin",
            help="Origin of web pages that may use the API from a browser; may be repeated. * for any.",
            show_default="none",
        ),
    ] = None,
    keep_alive: Annotated[
        float, typer.Option("--keep-alive", min=0.0, help="Seconds that an idle connection is kept.")
    ] = 75.0,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Option("--log-level", help="Least level of the log.")
    ] = "info",
    log_format: Annotated[
        Literal["text", "json"], typer.Option("--log-format", help="Format of the log, one line per request.")
    ] = "text",
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
    lenient: Annotated[
        bool,
        typer.Option(
            "--lenient", help="Leave out unknown fields of requests and count them, instead of refusing them."
        ),
    ] = False,
    timeout: Annotated[
        float, typer.Option("--timeout", help="Timeout of an answer in seconds, queueing included.")
    ] = 300.0,
    grace: Annotated[
        float, typer.Option("--grace", min=0.0, help="Seconds that running answers have to finish at shutdown.")
    ] = 10.0,
    nodes: TreesOption = None,
    floor: ChosenFloorOption = None,
    budget: BudgetOption = False,
    compiled: CompileOption = False,
    openvino: OpenVINOOption = None,
    plain: PlainOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Runs an OpenAI-compatible server, with a page that visualises drafts and accepted tokens."""
    import torch

    from ctc_drafter.decode.batch import AUTO, DecodingConfig
    from ctc_drafter.decode.profile import budget_for
    from ctc_drafter.load import load_pair
    from ctc_drafter.serve.engine import Worker
    from ctc_drafter.serve.metrics import log_to_stderr
    from ctc_drafter.serve.server import make_engine
    from ctc_drafter.serve.server import serve as run_server
    from ctc_drafter.serve.service import Limits, Service
    from ctc_drafter.steps import Steps

    log_to_stderr(log_level, log_format)
    steps = Steps(compiled, openvino=openvino)
    wanted = model.loading(steps)
    limits = Limits(max_new_tokens, max_prompt, max_body, timeout, grace, lenient)
    if api_key is None:
        api_key = os.environ.get("CTC_DRAFTER_API_KEY")  # an empty one is refused, not taken for none
    if threads:
        torch.set_num_threads(threads)
    names = model.names(plain)
    size = tree_nodes(nodes)
    public = name or public_name(names[0])
    worker = Worker("engine")

    def ready() -> Service:
        lm, tokenizer, draft = load_pair(*names, wanted)
        lm = steps.of(lm, [draft] if draft else [], size, batch_size)
        upto = None if size == AUTO or draft is None or not budget else budget_for(lm, draft, size, batch_size)
        decoding = DecodingConfig(size, floor, budget=upto)
        engine = make_engine(lm, draft, batch_size, queue, decoding, worker)
        return Service(engine, lm, tokenizer, public, limits)

    try:
        run_server(lambda: worker.do(ready), api_key, host, port, allowed_host or (), allow_origin or (), keep_alive)
    except KeyboardInterrupt:
        # The worker is inside torch, and Python would abort the process when it ends such a thread.
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)
    worker.close()


def public_name(target: str) -> str:
    """What a target is called in the API: folders and files without their place."""
    if target == "tiny":
        return "ctc-drafter-quickstart"
    path = Path(target)
    if path.is_dir():
        return path.resolve().name
    return path.stem if path.suffix.lower() == ".gguf" else target


registered(app, "demo", demo)
registered(app, "generate", generate)
registered(app, "chat", chat)
registered(app, "serve", serve, context_settings={"auto_envvar_prefix": "CTC_DRAFTER"})
registered(app, "recipe", resumable(recipe))
registered(app, "distill", resumable(distill))
registered(app, "train", resumable(train))
for command in (bench, profile, exactness, report, export):
    registered(app, command.__name__, command)
registered(app, "eval", evaluate)


def bad_input(error: Exception) -> str | None:
    """The one-line message of an error that the user can fix; None for a bug."""
    if hasattr(error, "format_message"):  # typer's own: unknown options, values out of range
        return str(error.format_message()).replace("\n", " ")
    from ctc_drafter.types import UserError, missing_extra, printable

    return " ".join(printable(str(error)).split()) if isinstance(error, UserError) else missing_extra(error)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C. Without arguments: the help."""
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        return int(app(args=arguments, prog_name="ctc-drafter", standalone_mode=False) or 0)
    except Exception as error:
        message = bad_input(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
