"""The exactness report: nothing differs in float32, and what differs is placed and weighed rightly."""

import pytest
import torch

from ctc_drafter.decode.generate import plain_generate
from ctc_drafter.evaluate.exactness import Case, Margins, exactness, exactness_table, first_difference, kernel_of
from ctc_drafter.evaluate.tasks import Prompt, Task
from ctc_drafter.target.model import Target
from tiny_models import tiny_drafter, tiny_llama, tiny_tokenizer

TASKS = [
    Task("chat", (Prompt("a", "chat", ("the cat sat", "and then?")), Prompt("b", "chat", ("the hat",)))),
    Task("maths", (Prompt("c", "maths", ("how many?",)),)),
]
OPTIONS = {"max_new_tokens": 16, "batch_size": 3, "nodes": 6}
NOISE = 2.0


class Noisy(Target):
    """Adds the same noise to the logits of every forward under a mask: plain decoding of one row has none."""

    def forward(self, tokens, positions, cache, allowed=None, *rest, **named):
        result = super().forward(tokens, positions, cache, allowed, *rest, **named)
        if allowed is not None:
            noise = torch.rand(result.logits.shape[-1], generator=torch.Generator().manual_seed(0))
            result.logits.add_(NOISE * noise)
        return result


@pytest.mark.parametrize("drafted", [True, False])
def test_nothing_differs_in_float32(drafted):
    model = tiny_llama()
    drafter = tiny_drafter(model) if drafted else None
    result = exactness(Target(model), drafter, tiny_tokenizer(), TASKS, **OPTIONS)
    names = ["trees of 6", "trees of 6, batch 3", "plain, batch 3", "plain, eager kernel"]
    assert [row["method"] for row in result["rows"]] == names
    assert all((row["outputs"], row["different"], row["share"]) == (4, 0, 0.0) for row in result["rows"])
    assert all(row["tokens"] > 30 for row in result["rows"])
    assert model.config._attn_implementation == "sdpa"


def test_what_differs_is_placed_and_no_larger_than_the_noise():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    clean = {
        (d["id"], d["turn"]): d
        for row in exactness(Noisy(model), None, tokenizer, TASKS, **OPTIONS)["rows"]
        if row["method"] == "trees of 6"
        for d in row["differences"]
    }
    assert clean
    for difference in clean.values():
        assert 0 <= difference["margin"] <= NOISE
        assert difference["plain"] != difference["other"]
    rows = {row["method"]: row for row in exactness(Noisy(model), None, tokenizer, TASKS, **OPTIONS)["rows"]}
    row = rows["trees of 6"]
    assert row["different"] == len(clean)
    assert row["share"] == len(clean) / 4
    assert row["largest_margin"] == max(d["margin"] for d in clean.values())
    assert rows["plain, eager kernel"]["different"] == 0


def test_margins_are_those_of_a_forward_over_the_whole_text():
    model = tiny_llama()
    prompt = [7, 8, 9]
    target = Margins(model)
    tokens = plain_generate(target, [prompt], max_new_tokens=6).tokens[0]
    with torch.no_grad():
        best = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].topk(2).values
    kept = torch.tensor([target.kept[len(prompt) - 1 + i] for i in range(6)])
    torch.testing.assert_close(kept, best[:, 0] - best[:, 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ([5, 6, 7], None),
        ([5, 9, 7], (1, 0.2, 6, 9)),
        ([5, 6], (2, 0.3, 7, None)),
        ([5, 6, 7, 8], (3, None, None, 8)),
    ],
)
def test_the_first_difference(other, expected):
    found = first_difference(Case("t", "i", 0, [1], [5, 6, 7], [0.1, 0.2, 0.3]), other)
    assert (found and (found.position, found.margin, found.plain, found.other)) == expected


def test_the_kernel_comes_back_after_an_error():
    target = Target(tiny_llama())
    with pytest.raises(ValueError, match="eager"), kernel_of(target, "eager"):
        raise ValueError(target.model.config._attn_implementation)
    assert target.model.config._attn_implementation == "sdpa"


def test_the_table_shows_each_way():
    result = exactness(Noisy(tiny_llama()), None, tiny_tokenizer(), TASKS[1:], **OPTIONS)
    assert exactness_table(result).row_count == len(result["rows"]) == 4
