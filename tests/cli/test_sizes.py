"""Errors in a drafter's sizes name the options of the command line."""

from typing import Any

import pytest

from ctc_drafter.cli.sizes import SIZE_OPTIONS, check_sizes, sizes_by_option
from ctc_drafter.drafters.registry import TRAINED, blank_drafter
from ctc_drafter.types import UserError
from helpers import tiny_config


@pytest.mark.parametrize(
    ("method", "sizes", "message"),
    [
        ("eagle", {"num_hidden_layers": 2}, "--draft-layers is 2; this drafter runs one layer: leave it out"),
        ("ctc", {"draft_length": 9, "frames": 8}, "--draft-length 9 must lie between 1 and frames (8)"),
        ("ctc", {"lookup_length": -1}, "--lookup is -1; give the most tokens to copy, or 0 for none"),
        ("medusa", {"draft_length": 0}, "--draft-length is 0; give at least 1"),
    ],
)
def test_wrong_values_are_told_by_their_option(method: str, sizes: dict[str, Any], message: str) -> None:
    check_sizes(method, dict.fromkeys(SIZE_OPTIONS) | sizes)
    with pytest.raises(UserError) as error, sizes_by_option():
        blank_drafter(method, **sizes)(tiny_config())
    assert str(error.value) == message


@pytest.mark.parametrize("method", TRAINED)
def test_a_size_is_refused_where_the_config_would_refuse_it(method: str) -> None:
    for key in SIZE_OPTIONS:
        sizes: dict[str, Any] = dict.fromkeys(SIZE_OPTIONS) | {key: 1}
        try:
            blank_drafter(method, **sizes)(tiny_config())
            unknown = False
        except UserError as error:
            unknown = "unknown key" in str(error)
        try:
            check_sizes(method, sizes)
            refused = False
        except UserError as error:
            refused = "takes no" in str(error)
        assert refused == unknown, key
