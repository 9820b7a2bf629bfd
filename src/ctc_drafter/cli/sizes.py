"""Sizes of a drafter as options of `train`: errors name the option, and which methods have it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from ctc_drafter.cli.options import refuse

SIZE_OPTIONS = {
    "frames": "--frames",
    "draft_length": "--draft-length",
    "num_hidden_layers": "--draft-layers",
    "predictor_rank": "--predictor-rank",
    "predictor_width": "--predictor-width",
    "predictor_tied": "--predictor-tied",
    "joint_tokens": "--joint-tokens",
    "joint_rank": "--joint-rank",
    "draft_vocab_size": "--draft-vocabulary",
    "carry": "--carry",
    "carry_rank": "--carry-rank",
    "carry_root": "--carry-root",
    "convolution": "--convolution",
    "copies": "--copies",
    "lookup_length": "--lookup",
}

# The predictor's sizes as typer knows them.
PredictorRank = Annotated[
    int | None,
    typer.Option(
        "--predictor-rank",
        help="Rank of the predictor's low-rank bias; 0 for no predictor.",
        show_default="the method's",
    ),
]
PredictorWidth = Annotated[
    int | None,
    typer.Option(
        "--predictor-width",
        help="Hidden size of the predictor; 0 to let it see the last token alone.",
        show_default="the method's",
    ),
]
PredictorTied = Annotated[
    bool | None,
    typer.Option(
        "--predictor-tied/--no-predictor-tied",
        help="Make the predictor's tables from the target's embedding instead of storing them.",
        show_default="the method's",
    ),
]
JointTokens = Annotated[
    int | None,
    typer.Option(
        "--joint-tokens",
        help="Likeliest tokens of each frame that are scored by frame and prefix together; 0 for none.",
        show_default="the method's",
    ),
]
JointRank = Annotated[
    int | None,
    typer.Option("--joint-rank", help="Rank of the scores of --joint-tokens.", show_default="the method's"),
]


def check_sizes(method: str, sizes: dict[str, Any]) -> None:
    """Refuses sizes that the drafter of a method does not have, by the names of their options. None: not given."""
    from ctc_drafter.drafters.registry import FOR_ABLATIONS, TRAINED, trained_method

    for key, option in SIZE_OPTIONS.items():
        if sizes[key] is not None and not trained_method(method).has(key):
            others = [name for name, each in TRAINED.items() if name not in FOR_ABLATIONS and each.has(key)]
            refuse(f"--method {method} takes no {option}; {', '.join(others)} {'do' if others[1:] else 'does'}")


@contextmanager
def sizes_by_option() -> Iterator[None]:
    """Names sizes in errors as on the command line: `--draft-layers`, not the config's `num_hidden_layers`."""
    from ctc_drafter.types import UserError

    try:
        yield
    except UserError as error:
        keys = "|".join(key for key in SIZE_OPTIONS if "_" in key)  # `frames` and `copies` are words, too
        raise UserError(re.sub(rf"\b({keys})\b", lambda found: SIZE_OPTIONS[found[0]], str(error))) from error
