"""`ctc-drafter distill`: the target's answers to prompts, in process or from a server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctc_drafter.cli.options import (
    BatchOption,
    DeviceOption,
    DtypeOption,
    LimitOption,
    NewTokensOption,
    RevisionOption,
    SeedOption,
    TargetOption,
    TemplateArgOption,
    TemplateOption,
    ThreadsOption,
    TokenizerOption,
    TrustOption,
    refuse,
)

if TYPE_CHECKING:
    from ctc_drafter.train.distill import Distilled


def distill(
    prompts: Annotated[
        str,
        typer.Option(
            "--prompts",
            help="Prompts: file (.jsonl, .jsonl.gz, .json, .txt), folder, hub:owner/name[:split], or self: the target, "
            "a chat model, writes --limit of them.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Output folder of the answers; the same command resumes it.")],
    target: TargetOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    tokenizer_name: TokenizerOption = None,
    pattern: Annotated[str, typer.Option("--pattern", help="Glob pattern of the files to read.")] = "*",
    limit: LimitOption = None,
    per_file: Annotated[
        int | None, typer.Option("--per-file", min=1, help="Maximum number of prompts per file.", show_default="all")
    ] = None,
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-prompt-tokens",
            min=1,
            help="Skip prompts longer than this; with --prompts self, of each user turn.",
            show_default="any; 256 with --prompts self",
        ),
    ] = None,
    cuts: Annotated[
        int, typer.Option("--cuts", min=0, help="Extra prompts per conversation that end within its answer.")
    ] = 0,
    prompt_temperature: Annotated[
        float | None,
        typer.Option(
            "--prompt-temperature", help="Sampling temperature of prompts of --prompts self.", show_default="1.0"
        ),
    ] = None,
    turns: Annotated[
        int | None,
        typer.Option("--turns", min=1, help="User turns per conversation of --prompts self.", show_default="1"),
    ] = None,
    max_new_tokens: NewTokensOption = 256,
    batch_size: BatchOption = 32,
    shard_size: Annotated[int, typer.Option("--shard-size", min=1, help="Answers per output file.")] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="Sampling temperature; 0 decodes greedily.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Nucleus sampling threshold.")] = 1.0,
    seed: SeedOption = 0,
    chat_template: TemplateOption = None,
    chat_template_arg: TemplateArgOption = None,
    server: Annotated[
        str | None,
        typer.Option("--server", help="URL of an OpenAI-compatible server that runs the target, http://.../v1."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Model name of the target on the server.", show_default="--target")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key", help="API key of the server.", show_default="CTC_DRAFTER_SERVER_API_KEY; OpenAI's for OpenAI"
        ),
    ] = None,
    concurrency: Annotated[
        int, typer.Option("--concurrency", min=1, help="Maximum number of concurrent requests.")
    ] = 32,
    retries: Annotated[
        int, typer.Option("--retries", min=0, help="Retries per request, with exponential backoff.")
    ] = 8,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Generates the target's answers to prompts, which drafters are trained on."""
    import torch

    from ctc_drafter.load import default_target, load_config, load_target, read_template
    from ctc_drafter.rows import describe_corpus
    from ctc_drafter.train.distill import Sampling
    from ctc_drafter.train.distill import distill as run_distill
    from ctc_drafter.train.distill_server import Server, distill_remotely, server_key
    from ctc_drafter.train.prompts import read_prompts
    from ctc_drafter.train.self_prompts import SelfPrompts, distill_self

    if threads:
        torch.set_num_threads(threads)
    if model and not server:
        refuse("--model is what a server calls the target; give --server as well")
    sampling = Sampling(temperature, top_p, seed)
    wanted = None
    if prompts == "self":
        if limit is None:
            refuse("--prompts self has no end of its own; give --limit, the number of prompts to write")
        if server:
            refuse(
                "--prompts self writes with the target in this process, and not through a server; leave out --server, "
                f"or write them here first and then give --prompts {out / 'self-prompts.jsonl'} with --server"
            )
        ignored = {"--pattern": pattern != "*", "--per-file": per_file is not None, "--cuts": cuts > 0}
        if any(ignored.values()):
            refuse(
                f"{next(name for name in ignored if ignored[name])} is about files; leave it out with --prompts self"
            )
        wanted = SelfPrompts(
            limit,
            1.0 if prompt_temperature is None else prompt_temperature,
            max_prompt_tokens or 256,
            turns or 1,
            seed,
        )
    elif prompt_temperature is not None or turns is not None:
        refuse("--prompt-temperature and --turns are about prompts that the target writes; give --prompts self as well")
    name = target or default_target()
    lm = None
    if server:
        config, tokenizer, eos = load_config(name, revision, trust_remote_code, tokenizer_name)
    else:
        lm, tokenizer = load_target(name, dtype, device, revision, trust_remote_code, tokenizer_name)
    read_template(tokenizer, chat_template, chat_template_arg or ())
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "shard_size": shard_size, "sampling": sampling}
    if wanted is not None and lm is not None:
        for folder, written, done in distill_self(
            lm, tokenizer, out, wanted, batch_size=batch_size, name=name, **options
        ):
            if folder != out:  # of the first turn's prompts the log has said it
                print(f"{folder}: {written}")
            say(folder, done)
        return
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
    options["source"] = describe_corpus(prompts)
    if lm is not None:
        done = run_distill(lm, tokenizer, found.prompts, out, batch_size=batch_size, name=name, **options)
    else:
        where = Server(server or "", model or name, server_key(server or "", api_key), concurrency, retries)
        done = distill_remotely(where, config, tokenizer, found.prompts, out, eos=eos, name=name, **options)
    say(out, done)


def say(out: Path, done: Distilled) -> None:
    """Prints what a distillation did, and warns of answers that were cut."""
    from ctc_drafter.train.data import MANY_CUT, cut_message

    if done.found and not (done.rows or done.too_long or done.left_out):
        print(f"{out}: nothing to do, {done.found} answers are there")
        return
    others = {"were there": done.found, "prompts were too long": done.too_long}
    others |= {f"were left out ({reason})": count for reason, count in done.left_out.items()}
    more = "".join(f", {count} {what}" for what, count in others.items() if count)
    print(f"{out}: {done.rows} answers with {done.tokens} tokens in {done.seconds:.0f} s{more}")
    if done.rows and done.cut > MANY_CUT * done.rows:
        show_warning(cut_message(done.cut / done.rows))


def show_warning(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
