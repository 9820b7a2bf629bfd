import itertools

import pytest
import torch

from ctc_oracle import collapse


@pytest.mark.parametrize(
    ("frames", "tokens"),
    [
        ([9, 9, 9], []),
        ([7, 7, 7], [7]),
        ([7, 9, 7], [7, 7]),
        ([9, 7, 7, 9, 9, 3, 9, 3], [7, 3, 3]),
        ([1, 2, 1, 2], [1, 2, 1, 2]),
    ],
)
def test_known_alignments(frames, tokens):
    found, length = collapse(torch.tensor(frames), blank=9)
    assert length.item() == len(tokens)
    assert found.tolist() == tokens + [-1] * (len(frames) - len(tokens))


def test_equals_groupby_on_all_alignments():
    alignments = list(itertools.product(range(4), repeat=5))
    tokens, lengths = collapse(torch.tensor(alignments).reshape(4, -1, 5), blank=2)
    assert tokens.dtype == lengths.dtype == torch.int64
    assert tokens.shape == (4, 256, 5)
    assert lengths.shape == (4, 256)
    for alignment, row, length in zip(
        alignments, tokens.reshape(-1, 5).tolist(), lengths.flatten().tolist(), strict=True
    ):
        expected = [symbol for symbol, _ in itertools.groupby(alignment) if symbol != 2]
        assert row[:length] == expected
        assert row[length:] == [-1] * (5 - len(expected))
