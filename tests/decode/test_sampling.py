"""Sampling is exact: the whole distribution, and token for token with the common stream."""

import itertools
import os
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from ctc_drafter.decode.generate import generate, plain_generate
from ctc_drafter.decode.sampling import ARGMAX, ModelSampling, Sampled, row_seeds, walk, warpers
from ctc_drafter.decode.verify import follow
from ctc_drafter.target.model import Target
from ctc_drafter.types import Candidates, UserError
from helpers import ScriptedDrafter, chi_square_p, tiny_drafter, tiny_target

SMALL, LENGTH = 5, 4
PROMPT = [1, 3]
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7], [8, 2, 8, 1]]
SEEDS = [11, 22, 33]
NEW = 24


def small_target():
    sizes = {"hidden_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 16}
    return tiny_target(3, vocab_size=SMALL, num_hidden_layers=2, **sizes)


@dataclass
class SuccessorDrafter:
    """Proposes root + 1, root + 2 and root + 3, and two successors of the first: a tree that draws cannot see."""

    feature_layers: tuple[int, ...] = ()

    def begin(self, embed: nn.Module, head: nn.Module, batch_size: int):
        return self

    def extend(self, tokens, features, counts):
        pass

    def select(self, rows):
        pass

    def propose(self, root, nodes, min_probability):
        tokens = (root.unsqueeze(1) + torch.tensor([1, 2, 3, 2, 3])) % SMALL
        parents = torch.tensor([-1, -1, -1, 0, 0]).expand_as(tokens)
        return Candidates(tokens, parents, (parents + 2).clamp(max=2), -0.3 * (parents + 2).double())


@dataclass(frozen=True)
class Typical:
    """Medusa's typical acceptance: any likely enough child will do. For the power check."""

    fair: Sampled

    def validate(self, row, logits):
        pass

    def sample(self, logits, rows):
        return self.fair.sample(logits, rows)

    def sample_tree(self, tree, logits, rows):
        probabilities = logits.softmax(-1)
        entropy = torch.special.entr(probabilities).sum(-1, keepdim=True)
        likely = probabilities > (0.7 * torch.exp(-entropy)).clamp(max=0.09)
        target_tokens = walk(tree, logits, rows, self.sample)
        for node in reversed(range(1, tree.tokens.shape[1])):
            row = torch.arange(len(target_tokens))
            fine = likely[row, tree.parents[:, node], tree.tokens[:, node]]
            target_tokens[row[fine], tree.parents[:, node][fine]] = tree.tokens[:, node][fine]
        return torch.where(target_tokens < 0, logits.argmax(-1), target_tokens)


@dataclass(frozen=True)
class LongestBeam:
    """Draws several continuations and keeps the one that the draft agrees with longest. For the power check."""

    beams: tuple[Sampled, ...]

    def validate(self, row, logits):
        pass

    def sample(self, logits, rows):
        return self.beams[0].sample(logits, rows)

    def sample_tree(self, tree, logits, rows):
        target_tokens = torch.stack([beam.sample_tree(tree, logits, rows) for beam in self.beams])
        counts = torch.stack([follow(tree, each).counts for each in target_tokens])
        return target_tokens[counts.argmax(0), torch.arange(len(rows))]


def exact_distribution(target, processors):
    """Probability of every output of LENGTH tokens, by one forward over all of them."""
    outputs = torch.tensor(list(itertools.product(range(SMALL), repeat=LENGTH)))
    texts = torch.cat([torch.tensor(PROMPT).expand(len(outputs), -1), outputs], 1)
    with torch.inference_mode():
        logits = target.model(texts).logits[:, len(PROMPT) - 1 : -1]
    steps = [processors(texts[:, : len(PROMPT) + i], logits[:, i]).softmax(-1) for i in range(LENGTH)]
    return torch.stack(steps, 1).double().gather(2, outputs.unsqueeze(2)).prod(1).squeeze(1)


def p_value(target, sampler_of, samples, processors, size=2000):
    """Chi-square p of `samples` outputs against the exact distribution; seeds are those of rows 0, 1, ..."""
    counts = torch.zeros(SMALL**LENGTH)
    weights = SMALL ** torch.arange(LENGTH - 1, -1, -1)
    for start in range(0, samples, size):
        sampler = sampler_of(row_seeds(5, range(start, start + size)))
        options = {"max_new_tokens": LENGTH, "nodes": 5, "min_probability": 0.0, "sampler": sampler}
        rows = torch.tensor(generate(target, SuccessorDrafter(), [PROMPT] * size, **options).tokens)
        counts += torch.bincount((rows * weights).sum(1), minlength=len(counts))
    expected = exact_distribution(target, processors) * samples
    assert counts[expected == 0].sum() == 0
    return chi_square_p(counts, expected)


def check_distribution(samples):
    target = small_target()
    for processors in (warpers(), warpers(temperature=0.8, top_k=4, top_p=0.9)):
        assert p_value(target, lambda seeds, used=processors: Sampled(seeds, used), samples, processors) > 0.001

    def typical(seeds):
        return Typical(Sampled(seeds))

    def longest(seeds):
        return LongestBeam((Sampled(seeds), Sampled(row_seeds(6, range(len(seeds))))))

    for biased in (typical, longest):
        assert p_value(target, biased, samples, warpers()) < 1e-6


@pytest.mark.slow
def test_the_whole_distribution():
    """`SAMPLES=200000 pytest -m slow tests/decode/test_sampling.py` is the long one."""
    check_distribution(int(os.environ.get("SAMPLES", "60000")))


@cache
def sampled_and_greedy(layout, batch):
    """A target, its plain sampled texts and its plain greedy ones."""
    target, prompts = Target.wrap(tiny_target().model, cache=layout), PROMPTS[:batch]
    plain = [plain_generate(target, prompts, max_new_tokens=NEW, sampler=each).tokens for each in (STREAM, ARGMAX)]
    return target, *plain


STREAM = Sampled(SEEDS, warpers(temperature=1.5, top_p=0.95))


@pytest.mark.sparing(12)
@pytest.mark.parametrize("right", [0, 4, (0, 3, 1, 4)], ids=["never", "always", "sometimes"])
@pytest.mark.parametrize("nodes", [1, 8, 64])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", ["dynamic", "static"])
def test_equals_plain_sampling_with_the_same_stream(right, nodes, batch, layout):
    target, expected, greedy = sampled_and_greedy(layout, batch)
    prompts = PROMPTS[:batch]
    scripts = [p + t for p, t in zip(prompts, expected, strict=True)]
    result = generate(target, ScriptedDrafter(scripts, right), prompts, max_new_tokens=NEW, nodes=nodes, sampler=STREAM)
    assert result.tokens == expected
    assert expected != greedy
    assert (result.stats.beta > 1.5) == (right != 0 and nodes > 1)


def test_the_ctc_drafter_never_changes_a_draw():
    target = tiny_target()
    for sampler in (Sampled(SEEDS), Sampled(5)):
        expected = plain_generate(target, PROMPTS, max_new_tokens=NEW, sampler=sampler).tokens
        assert generate(target, tiny_drafter(target), PROMPTS, max_new_tokens=NEW, sampler=sampler).tokens == expected


def test_a_row_depends_on_its_seed_and_prompt_alone():
    target, drafter = tiny_target(), tiny_drafter(tiny_target())
    together = generate(target, drafter, PROMPTS, max_new_tokens=NEW, sampler=Sampled(SEEDS)).tokens
    for order in ((1, 2, 0), (2, 1, 0)):
        seeds, prompts = [SEEDS[i] for i in order], [PROMPTS[i] for i in order]
        rows = generate(target, drafter, prompts, max_new_tokens=NEW, sampler=Sampled(seeds)).tokens
        assert rows == [together[i] for i in order]
    for row in range(3):
        alone = generate(target, drafter, [PROMPTS[row]], max_new_tokens=NEW, sampler=Sampled([SEEDS[row]])).tokens
        assert alone == [together[row]]
    twins = generate(target, drafter, [PROMPTS[0]] * 3, max_new_tokens=NEW, sampler=Sampled([1, 1, 2])).tokens
    assert twins[0] == twins[1] != twins[2]


def test_too_few_seeds():
    target = tiny_target()
    with pytest.raises(UserError, match="2 seeds for at least 3 rows"):
        plain_generate(target, PROMPTS, max_new_tokens=4, sampler=Sampled([1, 2]))


@pytest.mark.parametrize("setting", [{"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_settings_without_a_distribution(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        warpers(**setting)


def test_no_token_left():
    target = tiny_target()
    nothing = warpers()
    nothing.append(lambda _text, scores: torch.full_like(scores, float("-inf")))
    with pytest.raises(UserError, match="no token"):
        plain_generate(target, PROMPTS, max_new_tokens=4, sampler=replace(Sampled(1), processors=nothing))


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, ModelSampling()),
        ({"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1}, ModelSampling(repetition_penalty=1.1)),
        ({"do_sample": True}, ModelSampling(1.0)),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1},
            ModelSampling(0.6, 20, 0.95, 0.1),
        ),
    ],
)
def test_what_a_generation_config_says_of_sampling(stated: dict, expected: ModelSampling) -> None:
    assert ModelSampling.of(SimpleNamespace(generation_config=GenerationConfig(**stated))) == expected
    assert ModelSampling.of(SimpleNamespace()) == ModelSampling()
