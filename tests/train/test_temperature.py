"""The temperature of a drafter's scores: fitted by likelihood, used by every search, stored in the config."""

import json
import math
from pathlib import Path

import pytest
import torch

from ctc_drafter.ctc.copies import Text, copies_at
from ctc_drafter.ctc.lattice import lattice
from ctc_drafter.ctc.loss import prefix_log_probs
from ctc_drafter.decode.generate import generate, plain_generate
from ctc_drafter.decode.prefill import prefill
from ctc_drafter.drafters.base import Drafter
from ctc_drafter.drafters.baselines.chain_rule import ChainDrafter
from ctc_drafter.drafters.config import DrafterConfig
from ctc_drafter.drafters.ctc_session import SearchHead, best_first, level_by_level
from ctc_drafter.drafters.registry import trained_method
from ctc_drafter.drafters.trainable import LossInputs
from ctc_drafter.train.temperature import TRIED, fit_temperature, likeliest
from ctc_drafter.train.trainer import train_drafter
from ctc_drafter.types import UserError
from helpers import exact_in_tables, paths, tiny_drafter, tiny_target
from train_helpers import settings, written_rows

CHAINS = ("medusa", "hydra", "hydra++", "dflash", "dflash2", "dspark", "eagle")


class Known(ChainDrafter):
    """Says the same logits of every token."""

    def __init__(self, logits: torch.Tensor):
        super().__init__(DrafterConfig(vocab_size=len(logits), hidden_size=4))
        self.logits = logits

    def known_logits(self, states, prefixes, embed, head):
        return (self.logits.expand(len(states), -1) for _ in range(prefixes.shape[1] - 1))

    def draft_states(self, features, tokens, anchors, embed): ...
    def begin(self, embed, head, batch_size) -> Drafter: ...
    def prepare(self, embed, head): ...


@pytest.mark.parametrize("sharpness", [0.6, 1.0, 1.8])
def test_logits_that_are_too_sharp_or_too_flat_are_put_right(sharpness: float) -> None:
    """Tokens drawn with probabilities p; the drafter says sharpness * log p, so that the temperature is sharpness."""
    torch.manual_seed(0)
    right = torch.randn(50) * 2
    tokens = torch.distributions.Categorical(logits=right).sample((20_000, 3))
    prefixes = torch.cat([torch.zeros(len(tokens), 1, dtype=torch.long), tokens], 1)
    valid = torch.ones(len(tokens), 3, dtype=torch.bool)
    found = Known(right * sharpness).log_likelihoods(LossInputs(tokens, prefixes, valid), None, None, TRIED)
    assert likeliest(TRIED, found.tolist()) == pytest.approx(sharpness, rel=0.03)


def test_only_valid_and_drafted_labels_count() -> None:
    logits = torch.tensor([1.0, 2.0, -torch.inf])
    prefixes = torch.tensor([[0, 0, 1], [0, 1, 2], [0, 1, 0]])
    valid = torch.tensor([[True, True], [True, True], [False, False]])
    found = Known(logits).log_likelihoods(LossInputs(prefixes, prefixes, valid), None, None, (1.0, 2.0))
    for value, temperature in zip(found.tolist(), (1.0, 2.0), strict=True):
        shares = (logits / temperature).log_softmax(0)
        assert value == pytest.approx(float(shares[0] + 2 * shares[1]), rel=1e-5)


def test_the_top_of_a_parabola() -> None:
    tried = [2.0**i for i in range(-2, 3)]
    curve = [-((math.log2(each) - 0.3) ** 2) for each in tried]
    assert likeliest(tried, curve) == pytest.approx(2**0.3)
    assert likeliest(tried, [0, 1, 2, 3, 4]) == 4.0
    assert likeliest(tried, [5, 5, 5, 5, 5]) == 0.25


@pytest.mark.parametrize("name", CHAINS)
@torch.inference_mode()
def test_drafts_are_scored_at_the_temperature(name: str) -> None:
    """A prefix scores the product of softmax(logits / T), the logits those that training sees."""
    target = tiny_target()
    method = trained_method(name)
    torch.manual_seed(0)
    drafter = method.drafter.for_target(target.config, **{"draft_length": 3, **method.sizes}).eval()
    drafter.start_from(target.norm_scale, target.head)
    for weight in drafter.parameters():
        weight.add_(0.05 * torch.randn_like(weight))
    text, root = [3, 1, 4, 1, 5, 9], 2
    state = prefill(target, [text], drafter.feature_layers)

    def drafted() -> dict[tuple[int, ...], float]:
        session = drafter.begin(target.embed, target.head, 1)
        session.extend(state.tokens, state.features, state.lengths)
        return paths(session.propose(torch.tensor([root]), 12))

    plain = drafted()
    drafter.config.score_temperature = 0.25
    sharp = drafted()
    assert max(map(len, sharp)) > 1
    assert max(sharp.values()) > max(plain.values())
    compared = sorted((prefix for prefix in sharp if len(prefix) > 1), key=lambda each: -sharp[each])[:3]
    for prefix in compared:
        row = torch.tensor([[*text, root, *prefix]])
        features = target.hidden_features(row, drafter.feature_layers)
        states = drafter.draft_states(features, row, torch.tensor([[len(text)]]), target.embed)[0]
        known = torch.tensor([[root, *prefix, *[0] * (3 - len(prefix))]])
        logits = drafter.known_logits(states, known, target.embed, target.head)
        shares = [(each[0] / 0.25).log_softmax(-1) for each in logits]
        expected = sum(float(shares[u][token]) for u, token in enumerate(prefix))
        assert math.log(sharp[prefix]) == pytest.approx(expected, abs=0.15)  # heads and tables are rounded for drafting
    drafter.config.score_temperature = 3.0
    plain_text = plain_generate(target, [text], max_new_tokens=8).tokens
    assert generate(target, drafter, [text], max_new_tokens=8, nodes=6, min_probability=0.0).tokens == plain_text


@pytest.mark.parametrize("copies", [0, 4])
@torch.inference_mode()
def test_ours_is_scored_at_the_temperature(copies: int) -> None:
    """Both searches: prefixes of the lattice of all logits and biases divided by T."""
    target = tiny_target()
    drafter = tiny_drafter(target, copies=copies)
    for weight in drafter.parameters():
        weight.add_(0.1 * torch.randn_like(weight))
    exact_in_tables(drafter.predictor, target.embed)
    drafter.config.score_temperature = 0.25
    text, root = torch.tensor([[3, 1, 4, 1, 5, 3, 1]]), 4
    row = torch.cat([text, torch.tensor([[root]])], 1)
    features = target.hidden_features(row, drafter.feature_layers)
    states = drafter.draft_states(features, row, torch.tensor([[7]]), target.embed)[0]
    known = Text(row, torch.tensor([7]))
    parts = (drafter.predictor, drafter.joint, drafter.config.draft_length, target.embed)
    for make in (best_first, level_by_level):
        search = make(*parts, None, 0.25)
        heads = SearchHead(target.embed, target.head, search)
        found = paths(drafter.candidates(states, torch.tensor([root]), heads, 30, text=known))
        for prefix in sorted(found, key=lambda each: -found[each])[:8]:
            labels = torch.tensor([[root, *prefix]])
            whole = torch.cat([row, labels[:, 1:]], 1)
            suggested = copies_at(whole, torch.tensor([[7]]), len(prefix), copies)[0] if copies else None
            tokens, blanks, bias, _ = drafter.scores(states, labels, target.embed, target.head, suggested)
            made = lattice(tokens / 0.25, blanks / 0.25, labels[:, 1:], bias / 0.25)
            expected = float(prefix_log_probs(made, labels[:, 1:])[0, -1])
            assert math.log(found[prefix]) == pytest.approx(expected, abs=2e-3)


@torch.inference_mode()
def test_ours_is_fitted_by_the_likelihood_of_whole_prefixes() -> None:
    target = tiny_target()
    drafter, held_out = tiny_drafter(target, copies=4), written_rows(target, 3)
    found = fit_temperature(target, drafter, held_out)
    prefixes = torch.tensor([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])
    inputs = LossInputs(torch.randn(2, 6, 64), prefixes, torch.tensor([[True] * 4, [True, True, False, False]]))
    two = drafter.log_likelihoods(inputs, target.embed, target.head, (1.0, 2.0))
    made = drafter.lattice(inputs.states, prefixes, target.embed, target.head)
    alone = prefix_log_probs(made, prefixes[:, 1:])
    assert float(two[0]) == pytest.approx(float(alone[0, 3] + alone[1, 1]), rel=1e-5)
    assert found == drafter.config.score_temperature != 1.0


def test_training_with_held_out_rows_stores_it(tmp_path: Path) -> None:
    target = tiny_target()
    rows, held_out = written_rows(target, 4), written_rows(target, 3)
    drafter = trained_method("medusa").drafter.for_target(target.config, draft_length=2)
    options = settings(steps=2, eval_every=99)
    train_drafter(target, drafter, rows, held_out, tmp_path / "m", options)
    stored = json.loads((tmp_path / "m" / "config.json").read_text())["score_temperature"]
    assert stored == drafter.config.score_temperature != 1.0
    drafter.config.score_temperature = 1.0
    assert fit_temperature(target, drafter, held_out) == stored
    again = type(drafter).from_pretrained(tmp_path / "m")
    assert again.config.score_temperature == stored
    paper = trained_method("ctc-paper").drafter.for_target(target.config, frames=4, draft_length=3)
    assert fit_temperature(target, paper, held_out) is None  # its scores have none


def test_values_that_cannot_be() -> None:
    for wrong in (0.0, -1.0, math.inf):
        with pytest.raises(UserError, match="score_temperature is"):
            DrafterConfig(score_temperature=wrong)
