"""`ctc-drafter chat`: a conversation in the terminal, streamed, with tokens per step."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from ctc_drafter.cli.groups import AnswerOptions, ModelOptions, grouped
from ctc_drafter.cli.options import NewTokensOption, OpenVINOOption

if TYPE_CHECKING:
    from ctc_drafter.cli.answer import Answerer

HELP = "/new starts a new conversation, /exit or Ctrl-D ends; Ctrl-C stops an answer"


@grouped
def chat(
    model: ModelOptions,
    answers: AnswerOptions,
    system: Annotated[str, typer.Option("--system", help="System prompt.", show_default=False)] = "",
    max_new_tokens: NewTokensOption = 1024,
    openvino: OpenVINOOption = None,
) -> None:
    """Chats with the target in the terminal."""
    from ctc_drafter.cli.answer import Answerer
    from ctc_drafter.decode.sampling import ModelSampling
    from ctc_drafter.load import load_pair
    from ctc_drafter.steps import Steps

    steps = Steps(openvino=openvino)
    wanted, settings = model.loading(steps), answers.settings(max_new_tokens)
    lm, tokenizer, draft = load_pair(*model.names(answers.plain), wanted)
    lm = steps.of(lm, [draft] if draft else [], settings.nodes, 1)
    answerer = Answerer(lm, draft, tokenizer, settings.filled(ModelSampling.of(lm.model)))
    print(HELP, file=sys.stderr)
    converse(answerer, typed() if sys.stdin.isatty() else sys.stdin, sys.stdout, system)


def typed() -> Iterator[str]:
    """Lines of a terminal, with Python's line editing, until Ctrl-D or Ctrl-C."""
    with suppress(ImportError):  # there is none on Windows
        import readline  # noqa: F401  # input() uses it
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def converse(answerer: Answerer, lines: Iterable[str], out: TextIO, system: str = "") -> None:
    """Answers each line, with all that was said before it. A line that cannot be answered is left out, and said why.

    Figures go to stderr. A sampled answer's seed is made of `--seed` and the number of its turn.
    """
    from ctc_drafter.chat import encode_conversation
    from ctc_drafter.cli.answer import figures_line, stream
    from ctc_drafter.types import UserError

    turns: list[str] = []
    answers: list[str] = []
    for line in lines:
        text = line.strip()
        if not text:
            continue
        if text in ("/exit", "/quit"):
            return
        if text == "/new":
            turns, answers = [], []
            continue
        if text.startswith("/") and " " not in text and text.count("/") == 1:
            say(f"there is no {text}; {HELP}")
            continue
        try:
            ids = encode_conversation(answerer.tokenizer, [*turns, text], answers, system=system)
        except UserError as error:
            say(str(error))
            continue
        if len(ids) >= answerer.target.context:
            say(f"the chat is full ({len(ids)} of {answerer.target.context} tokens); /new starts another")
            continue
        try:
            generation = stream(answerer, [ids], out, len(turns))
        except KeyboardInterrupt:
            say("\nstopped; the question is left out of the conversation")
            continue
        turns, answers = [*turns, text], [*answers, answerer.text(generation.tokens[0])]
        say(figures_line(generation.stats))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
