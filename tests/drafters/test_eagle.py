"""EAGLE: training at anchors, sessions and trees against a rollout written out pair by pair."""

import math

import pytest
import torch
from torch.nn import functional as fn

from ctc_drafter.decode.prefill import prefill
from ctc_drafter.drafters.baselines.eagle import EagleDrafter
from ctc_drafter.drafters.layers import apply_rotary
from ctc_drafter.train.validate import offline_beta
from helpers import tiny_target
from train_helpers import written_rows

LENGTH = 3
TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


def fresh(target, seed: int = 0) -> EagleDrafter:
    torch.manual_seed(seed)
    drafter = EagleDrafter.for_target(target.config, draft_length=LENGTH)
    drafter.start_from(target.norm_scale, target.head)
    with torch.no_grad():
        for weight in drafter.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return drafter.eval()


def rollout(target, drafter, features: torch.Tensor, known: list[int], drafted: list[int]) -> torch.Tensor:
    """Logits `[1+len(drafted), V]` after the root, the last one of known, and after each drafted token.

    features `[len(known)-1, K]`. One pair at a time, each attending to all before it; nothing is cached.
    """
    layer, config = drafter.layer, drafter.config
    before = [torch.zeros(config.hidden_size), *drafter.fc(features)]
    logits = []
    for _ in [0, *drafted]:
        tokens = torch.tensor([*known, *drafted][: len(before)])
        states = torch.stack(before)
        pairs = torch.cat([layer.input_layernorm(target.embed(tokens)), layer.hidden_norm(states)], -1)
        rotary = [part[0] for part in drafter.rotation(torch.arange(len(before)).unsqueeze(0))]
        attention = layer.self_attn
        split = [
            projection(pairs).unflatten(-1, (-1, config.head_dim)).transpose(0, 1)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        queries, keys = (
            apply_rotary(attention.q_norm(split[0]), rotary),
            apply_rotary(attention.k_norm(split[1]), rotary),
        )
        share = config.num_attention_heads // config.num_key_value_heads
        keys, values = keys.repeat_interleave(share, 0), split[2].repeat_interleave(share, 0)
        weights = (queries[:, -1:] @ keys.transpose(1, 2) / math.sqrt(config.head_dim)).softmax(-1)
        state = states[-1] + attention.o_proj((weights @ values)[:, 0].flatten())
        normed = layer.post_attention_layernorm(state)
        state = state + layer.mlp.down_proj(fn.silu(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed))
        logits.append(target.head(drafter.norm(state)))
        before.append(state)
    return torch.stack(logits)


@torch.inference_mode()
def test_training_sees_what_a_rollout_sees() -> None:
    """Ragged rows, anchors close together and at both ends of a text, the first of them with nothing before it."""
    target = tiny_target()
    drafter = fresh(target)
    tokens = torch.tensor([TEXT, [2, 7, 1, 8, 2, 8, 1, 0, 0, 0, 0, 0]])
    features = target.hidden_features(tokens, drafter.feature_layers)
    anchors = torch.tensor([[0, 4, 5, 8], [1, 2, 3, 3]])
    blocks = drafter.draft_states(features, tokens, anchors, target.embed)
    assert blocks.shape == (2, 4, LENGTH, 64)
    for row, column in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 2)]:
        place = int(anchors[row, column])
        text = tokens[row].tolist()
        labels = text[place + 1 : place + 1 + LENGTH]
        expected = rollout(target, drafter, features[row, :place], text[: place + 1], labels[:-1])
        torch.testing.assert_close(target.head(blocks[row, column]), expected, atol=1e-4, rtol=1e-4)
        prefix = torch.tensor([[text[place], *labels]])
        found = drafter.log_probs(blocks[row, column : column + 1], prefix, target.embed, target.head)
        steps = expected.log_softmax(-1).gather(1, torch.tensor(labels).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(found[0], steps, atol=1e-4, rtol=1e-4)


def paths_of(candidates, row: int) -> list[list[int]]:
    paths: list[list[int]] = []
    for token, parent in zip(candidates.tokens[row].tolist(), candidates.parents[row].tolist(), strict=True):
        paths.append([*(paths[parent] if parent >= 0 else []), token])
    return paths


@pytest.mark.parametrize("nodes", [1, 5, 24])
@torch.inference_mode()
def test_a_trees_scores_are_those_of_the_rollouts_along_it(nodes: int) -> None:
    target = tiny_target()
    drafter = fresh(target)
    rows = [TEXT[:9], [2, 7, 1]]
    state = prefill(target, rows, drafter.feature_layers)
    session = drafter.begin(target.embed, target.head, 2)
    session.extend(state.tokens[:, :2], state.features[:, :2], torch.tensor([2, 1]))
    session.propose(torch.tensor([1, 2]), 16)  # what it leaves behind must not be seen
    rest = torch.tensor([list(range(2, 9)), [1, 2, 2, 2, 2, 2, 2]])
    features = state.features.gather(1, rest.unsqueeze(-1).expand(-1, -1, state.features.shape[-1]))
    session.extend(state.tokens.gather(1, rest), features, torch.tensor([7, 2]))
    roots = torch.tensor([4, 9])
    session.head = type(session.head)(target.embed, target.head)  # the head in full precision
    candidates = session.propose(roots, nodes)
    for row, text in enumerate(rows):
        scores = {}
        for path, score in zip(paths_of(candidates, row), candidates.scores[row].tolist(), strict=True):
            if score == -math.inf:  # padding
                continue
            known = [*text, int(roots[row])]
            logits = rollout(target, drafter, state.features[row, : len(text)], known, path[:-1])
            steps = logits.log_softmax(-1).gather(1, torch.tensor(path).unsqueeze(1))
            assert score == pytest.approx(float(steps.sum()), abs=1e-3)
            scores[tuple(path)] = score
        assert len(scores) >= nodes
        best = max(range(97), key=lambda token: float(logits[0, token]))
        assert max(scores, key=scores.__getitem__) == (best,)


@torch.inference_mode()
def test_features_at_and_after_an_anchor_do_not_reach_it() -> None:
    target = tiny_target()
    drafter = fresh(target)
    tokens, anchors = torch.tensor([TEXT]), torch.tensor([[4, 6]])
    features = target.hidden_features(tokens, drafter.feature_layers)
    before = drafter.draft_states(features, tokens, anchors, target.embed)
    spoilt, other = features.clone(), tokens.clone()
    spoilt[:, 4:] = 7.0
    changed = drafter.draft_states(spoilt, tokens, anchors, target.embed)
    torch.testing.assert_close(changed[:, 0], before[:, 0])
    assert not torch.allclose(changed[:, 1], before[:, 1])
    other[:, 6:] = 0  # y2 and later of the first anchor: only what comes after y2 may change
    changed = drafter.draft_states(features, other, anchors, target.embed)
    torch.testing.assert_close(changed[:, 0, :2], before[:, 0, :2])
    assert not torch.allclose(changed[:, 0, 2], before[:, 0, 2])


def test_the_loss_of_a_late_depth_reaches_the_features() -> None:
    target = tiny_target()
    drafter = fresh(target)
    tokens = torch.tensor([TEXT])
    features = target.hidden_features(tokens, drafter.feature_layers)
    drafter.draft_states(features, tokens, torch.tensor([[4]]), target.embed)[0, 0, -1].sum().backward()
    for name, weight in drafter.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all()
        assert weight.grad.abs().sum() > 0, name


def test_validation_does_not_depend_on_how_it_is_cut() -> None:
    target = tiny_target()
    drafter = fresh(target)
    rows = written_rows(target, 4)
    whole = offline_beta(target, drafter, rows, nodes=(4, 16))
    assert offline_beta(target, drafter, rows, nodes=(4, 16), chunk=7, batch_size=3) == whole
