"""Tiny targets and drafters whose drafts are never, always or sometimes right."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ctc_drafter.drafters.ctc import COPYING, CTCDrafter
from ctc_drafter.drafters.predictor import Predictor
from ctc_drafter.evaluate import exactness
from ctc_drafter.target.model import Target
from ctc_drafter.types import Candidates

VOCABULARY = 97


def tiny_config(**overrides) -> LlamaConfig:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "eos_token_id": None,  # texts end at their limit, unless a test says otherwise
        "initializer_range": 0.2,  # large: random logits then differ enough for text to vary
    }
    return LlamaConfig(**{**sizes, **overrides})


MADE: dict[str, tuple[Target, torch.Tensor]] = {}


def tiny_target(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> Target:
    """A copy of its own for each test, but made and tried once in a process; the generator stands as it did then."""
    key = repr((seed, dtype, sorted(overrides.items())))
    if key not in MADE:
        torch.manual_seed(seed)
        made = Target.wrap(LlamaForCausalLM(tiny_config(**overrides)).to(dtype).eval())
        MADE[key] = made, torch.get_rng_state()
    torch.set_rng_state(MADE[key][1])
    return Target(copy.deepcopy(MADE[key][0].model))


def tiny_drafter(target: Target, seed: int = 0, **overrides) -> CTCDrafter:
    torch.manual_seed(seed)
    drafter = CTCDrafter.for_target(target.config, **{"frames": 5, "draft_length": 4, **overrides})
    return drafter.to(target.dtype).eval()


@torch.no_grad()
def without_copies(drafter: CTCDrafter) -> CTCDrafter:
    """The same drafter where nobody knows the text, as in engines: it drafts what its frames say."""
    config = copy.deepcopy(drafter.config)
    config.copies = config.lookup_length = 0
    plain = type(drafter)(config)
    plain.load_state_dict({key: value for key, value in drafter.state_dict().items() if not key.startswith(COPYING)})
    return plain.to(drafter.device, drafter.dtype).eval()


@torch.no_grad()
def exact_in_tables(predictor: Predictor, embed: torch.nn.Module) -> None:
    """Rounds embedding, W2 and the maps of embeddings so that int8 and bfloat16 say what comes of them: the searches on
    a CPU then read what the module computes."""
    if predictor.width:
        for weight in (embed.weight, predictor.previous.weight, predictor.last.weight):
            step = 2.0 ** torch.floor(torch.log2(weight.abs().max() / 2))  # sums are small numbers of such steps
            weight.copy_((weight / step).round() * step)
    *_, scale, output, _copying, _trust = predictor.tables(embed)
    predictor.output.weight.copy_((scale.unsqueeze(1) * output).t())


def chi_square_p(counts: torch.Tensor, expected: torch.Tensor, least: float = 10.0) -> float:
    """Pearson's p-value; cells that expect fewer than `least` are put together."""
    counts, expected = counts.double(), expected.double()
    few = expected < least
    counts = torch.cat([counts[~few], counts[few].sum().unsqueeze(0)])
    expected = torch.cat([expected[~few], expected[few].sum().unsqueeze(0)])
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2.0), (statistic / 2).float()))


class ScriptedDrafter(exactness.ScriptedDrafter):
    """With the vocabulary of the tiny targets."""

    def __init__(self, scripts: Sequence[Sequence[int]], wrong_after: int | Sequence[int], depth: int = 4):
        super().__init__(scripts, wrong_after, VOCABULARY, depth)


def paths(candidates: Candidates, row: int = 0) -> dict[tuple[int, ...], float]:
    """The prefixes of one row with their probabilities."""
    known: list[tuple[int, ...]] = []
    found = {}
    for place, token in enumerate(candidates.tokens[row].tolist()):
        parent = int(candidates.parents[row, place])
        known.append((*(known[parent] if parent >= 0 else ()), token))
        if candidates.scores[row, place] > float("-inf"):
            found[known[-1]] = math.exp(candidates.scores[row, place])
            assert int(candidates.depths[row, place]) == len(known[-1])
    return found
