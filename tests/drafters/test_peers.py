"""Medusa, Hydra, DFlash, DSpark and EAGLE: lossless, one trainer, trees checked by brute force."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ctc_drafter.decode.generate import generate, generate_many, plain_generate
from ctc_drafter.decode.prefill import prefill
from ctc_drafter.drafters.baselines.chain_rule import cross_entropy
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.drafters.registry import TRAINED, method_of, open_drafter, trained_method
from ctc_drafter.train.trainer import train_drafter
from ctc_drafter.types import UserError
from helpers import VOCABULARY, tiny_config, tiny_target
from train_helpers import settings, written_rows

CHAINS = ("medusa", "hydra", "hydra++", "dflash", "dspark")
BLOCKS = (*CHAINS, "ctc-paper", "dflash2")  # all that can be said before a token is drafted is in their blocks
PEERS = (*BLOCKS, "eagle")
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7], [8, 2, 8, 1]]
LENGTH = 3


def fresh(target, name: str, seed: int = 0, **overrides):
    """An untrained drafter, spread out so that its parts matter."""
    method = trained_method(name)
    torch.manual_seed(seed)
    drafter = method.drafter.for_target(target.config, **{"draft_length": LENGTH, **method.sizes, **overrides})
    drafter.start_from(target.norm_scale, target.head)
    with torch.no_grad():
        for weight in drafter.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return drafter.eval()


def state_of(target, drafter, rows=PROMPTS):
    state = prefill(target, rows, drafter.feature_layers)
    session = drafter.begin(target.embed, target.head, len(rows))
    session.extend(state.tokens, state.features, state.lengths)
    return state, session


@pytest.mark.sparing(7)
@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize(("batch", "nodes"), [(1, 1), (1, 16), (3, 8)])
def test_drafters_never_change_the_output(name: str, batch: int, nodes: int) -> None:
    target = tiny_target()
    expected = plain_generate(target, PROMPTS[:batch], max_new_tokens=16).tokens
    drafter = fresh(target, name)
    assert (
        generate(target, drafter, PROMPTS[:batch], max_new_tokens=16, nodes=nodes, min_probability=0.0).tokens
        == expected
    )


@pytest.mark.parametrize("name", PEERS)
def test_output_is_unchanged_when_no_prefix_is_likely_enough(name: str) -> None:
    target = tiny_target()
    expected = plain_generate(target, PROMPTS, max_new_tokens=5).tokens
    assert (
        generate(target, fresh(target, name), PROMPTS, max_new_tokens=5, nodes=8, min_probability=0.999).tokens
        == expected
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
def test_bfloat16_runs(name: str, tmp_path: Path) -> None:
    target = tiny_target(dtype=torch.bfloat16)
    drafter = fresh(target, name).to(torch.bfloat16)
    assert all(len(row) == 8 for row in generate(target, drafter, PROMPTS, max_new_tokens=8).tokens)
    exact = tiny_target()
    options = settings(steps=2, bf16=True, anchor_chunk=5)
    assert train_drafter(exact, fresh(exact, name), written_rows(exact, 3), None, tmp_path, options).steps == 2


@pytest.mark.parametrize("name", PEERS)
def test_rows_that_join_and_leave(name: str) -> None:
    target = tiny_target()
    expected = plain_generate(target, PROMPTS, max_new_tokens=12).tokens
    found = dict(
        generate_many(target, fresh(target, name), PROMPTS, in_flight=2, max_new_tokens=12, min_probability=0.0)
    )
    assert found == dict(enumerate(expected))


@pytest.mark.parametrize("name", PEERS)
@torch.inference_mode()
def test_a_session_drafts_what_training_saw(name: str) -> None:
    """Blocks over whole rows, as in training, against a session that is fed in two parts and then joined."""
    target = tiny_target()
    drafter = fresh(target, name)
    rows = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [2, 7, 1, 8, 2, 8], [1, 6, 1, 8]]
    state = prefill(target, rows, drafter.feature_layers)
    session = drafter.begin(target.embed, target.head, 2)
    session.extend(state.tokens[:2, :3], state.features[:2, :3], torch.tensor([3, 1]))
    session.propose(state.tokens[:2, 0], 4)  # a draft in between must leave no trace
    index = torch.tensor([[3, 4, 5, 6], [1, 2, 3, 3]])
    features = state.features[:2].gather(1, index.unsqueeze(-1).expand(-1, -1, state.features.shape[-1]))
    session.extend(state.tokens[:2].gather(1, index), features, torch.tensor([4, 3]))
    session.join(state.tokens[2:, :3], state.features[2:, :3], torch.tensor([2]))

    anchors = torch.tensor([[7], [4], [2]])
    root = state.tokens.gather(1, anchors).squeeze(1)
    heads = drafter.prepared(target.embed, target.head)
    used = torch.ones_like(anchors, dtype=torch.bool)
    (expected,) = drafter.drafts(state.features, state.tokens, anchors, used, heads, nodes=6, chunk=8)
    found = session.propose(root, 6)
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.scores, expected.scores, atol=2e-5, rtol=0)
    session.select(torch.tensor([2, 0]))
    assert torch.equal(session.propose(root[[2, 0]], 6).tokens[:, :6], expected.tokens[[2, 0], :6])


@pytest.mark.parametrize("name", BLOCKS)
@torch.inference_mode()
def test_later_tokens_do_not_reach_a_block(name: str) -> None:
    target = tiny_target()
    drafter = fresh(target, name)
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    features = target.hidden_features(tokens, drafter.feature_layers)
    anchors = torch.tensor([[4]])
    before = drafter.draft_states(features, tokens, anchors, target.embed)
    spoilt, other = features.clone(), tokens.clone()
    spoilt[:, 4:], other[:, 5:] = 7.0, 0
    torch.testing.assert_close(drafter.draft_states(spoilt, other, anchors, target.embed), before)
    spoilt[:, 3] = 7.0
    assert not torch.allclose(drafter.draft_states(spoilt, other, anchors, target.embed), before)


def brute_force(name: str, target, drafter, root: int, state, blocks) -> dict[tuple[int, ...], float]:
    """The probability of every prefix over a few tokens, from the weights as the papers write them."""
    few = [0, 1, 2]
    scores: dict[tuple[int, ...], float] = {(): 1.0}
    silu, linear = torch.nn.functional.silu, torch.nn.functional.linear
    for size, prefix in [(s, p) for s in range(LENGTH) for p in itertools.product(few, repeat=s)]:
        if name == "medusa":
            head = drafter.heads[size][0]
            hidden = blocks[0] + silu(linear(blocks[0], head.weight, head.bias))
            logits = drafter.own[size].weight @ hidden
        elif name.startswith("hydra"):
            head = drafter.heads[size]
            seen = torch.cat([blocks[0], *(target.embed.weight[token] for token in (root, *prefix))])
            whole = torch.cat([head.state.weight, head.tokens.weight], 1) @ seen + head.state.bias
            hidden = whole[:64] + silu(whole[64:])
            for layer in head.inner:
                hidden = hidden + silu(linear(hidden, layer.weight, layer.bias))
            logits = drafter.own[size].weight @ hidden
        else:
            logits = target.head.weight @ blocks[0, 1 + size]
            if name == "dspark":
                last = (root, *prefix)[-1]
                logits = logits + drafter.predictor.output.weight @ drafter.predictor.table.weight[last]
        steps = logits.softmax(-1)
        for token in few:
            scores[(*prefix, token)] = scores[prefix] * float(steps[token])
    del scores[()]
    return scores


@pytest.mark.parametrize("name", CHAINS)
@torch.inference_mode()
def test_scores_are_the_product_of_the_tokens_probabilities(name: str) -> None:
    target = tiny_target()
    drafter = fresh(target, name)
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9]])
    features = target.hidden_features(tokens, drafter.feature_layers)
    blocks = drafter.draft_states(features, tokens, torch.tensor([[4]]), target.embed)[:, 0]
    expected = brute_force(name, target, drafter, 5, None, blocks)
    prefixes = [prefix for prefix in expected if len(prefix) == LENGTH]
    rows = torch.tensor([[5, *prefix] for prefix in prefixes])
    log_probs = drafter.log_probs(blocks.expand(len(rows), *blocks.shape[1:]), rows, target.embed, target.head)
    for prefix, steps in zip(prefixes, log_probs.cumsum(1).exp().tolist(), strict=True):
        assert steps == pytest.approx([expected[prefix[: u + 1]] for u in range(LENGTH)], rel=1e-3)

    exact = type(drafter.prepared(target.embed, target.head))(target.embed, target.head, drafter.outputs(target.head))
    found = drafter.candidates(blocks, torch.tensor([5]), exact, nodes=VOCABULARY)
    paths: list[tuple[int, ...]] = []
    compared = 0
    for place, token in enumerate(found.tokens[0].tolist()):
        parent = int(found.parents[0, place])
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
        if paths[-1] in expected:
            compared += 1
            assert math.exp(found.scores[0, place]) == pytest.approx(expected[paths[-1]], rel=1e-3)
    assert compared >= 3


@torch.inference_mode()
def test_heads_read_the_targets_last_hidden_state_and_start_as_its_head() -> None:
    target = tiny_target()
    target.model.model.norm.weight.data.uniform_(0.5, 2.0)
    drafter = trained_method("medusa").drafter.for_target(target.config, draft_length=2)
    drafter.start_from(target.norm_scale, target.head)
    tokens = torch.tensor([PROMPTS[0]])
    blocks = drafter.draft_states(
        target.hidden_features(tokens, drafter.feature_layers), tokens, torch.tensor([[0, 5]]), target.embed
    )
    assert (blocks[0, 0] == 0).all()
    log_probs = drafter.log_probs(blocks[0, 1:], torch.tensor([[9, 7, 7]]), target.embed, target.head)
    expected = target.model(tokens).logits[0, 4].log_softmax(-1)[7]
    torch.testing.assert_close(log_probs[0], expected.expand(2), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["hydra", "hydra++"])
@torch.inference_mode()
def test_heads_of_hydra_start_as_the_targets(name: str) -> None:
    target = tiny_target()
    method = trained_method(name)
    drafter = method.drafter.for_target(target.config, draft_length=2, **method.sizes)
    drafter.start_from(target.norm_scale, target.head)
    state = torch.randn(1, 64)
    for logits in drafter.known_logits(state, torch.tensor([[9, 7, 7]]), target.embed, target.head):
        torch.testing.assert_close(logits, target.head(state), atol=1e-4, rtol=1e-4)


def test_the_loss_weighs_tokens_and_skips_padding() -> None:
    log_probs = torch.tensor([[-1.0, -2.0, -4.0], [-1.0, -2.0, -4.0], [-1.0, -2.0, -4.0]])
    valid = torch.tensor([[True, True, True], [True, True, False], [False, False, False]])
    losses = cross_entropy(log_probs, valid, 0.5)
    assert losses.tolist() == pytest.approx([(1 + 1 + 1) / 1.75, (1 + 1) / 1.5, 0.0])


@pytest.mark.sparing
@pytest.mark.parametrize("name", PEERS)
def test_each_learns_a_text_and_is_loaded_by_its_config(name: str, tmp_path: Path) -> None:
    target = tiny_target()
    rows = written_rows(target, 4, answer=24)
    method = trained_method(name)
    torch.manual_seed(0)
    drafter = method.drafter.for_target(target.config, draft_length=LENGTH, **method.sizes)
    drafter.start_from(target.norm_scale, target.head)
    options = method.training | {
        "steps": 20,
        "batch_size": 4,
        "log_every": 5,
        "eval_every": 10,
        "save_every": 100,
        "eval_nodes": (4, 16),
    }
    done = train_drafter(target, drafter, rows, rows, tmp_path, settings(**options))
    losses = [entry["loss"] for entry in done.history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]  # a teacher's doubt stays
    betas = [entry["eval_beta_16"] for entry in done.history if "eval_beta_16" in entry]
    assert betas[-1] >= betas[0]
    assert betas[-1] > 1.3

    loaded = open_drafter(str(tmp_path))
    assert type(loaded) is method.drafter
    assert method_of(loaded) == name
    for key, tensor in drafter.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[key])
    prompt = [row.ids[: row.answer_start].tolist() for row in rows.rows[:1]]
    stats = generate(target, loaded, prompt, max_new_tokens=20, nodes=16, min_probability=0.0).stats
    assert stats.beta > 1.2


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("medusa", {"frames": 4}, "unknown key 'frames'"),
        ("medusa", {"draft_length": 0}, "draft_length is 0"),
        ("medusa", {"target_layer_ids": [0, 2]}, "must name one block"),
        ("hydra", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ("hydra", {"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ("dflash", {"mask_token_id": VOCABULARY}, "mask_token_id"),
        ("dspark", {"predictor_rank": 0}, "predictor_rank is 0"),
        ("eagle", {"num_hidden_layers": 2}, "runs one layer"),
    ],
)
def test_impossible_configs_are_refused(name: str, overrides: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        trained_method(name).drafter.for_target(tiny_config(), **overrides)


def test_what_is_no_drafter_is_named(tmp_path: Path) -> None:
    target = tiny_target()
    with pytest.raises(UserError, match=r"unknown method medus; known are ctc, ctc-linear, ctc-paper, medusa"):
        trained_method("medus")
    with pytest.raises(UserError, match="nothing to train"):
        trained_method("prompt_lookup")
    with pytest.raises(UserError, match="loss is for drafters with blanks"):
        fresh(target, "medusa").check_loss("ctc")
    with pytest.raises(UserError, match="the teacher loss is for drafters without blanks"):
        fresh(target, "ctc-paper").check_loss("teacher")
    with pytest.raises(UserError, match="no drafter could be loaded from"):
        open_drafter(str(tmp_path / "missing"))
    target.model.save_pretrained(tmp_path / "target")
    with pytest.raises(UserError, match="holds no drafter but a model of type llama"):
        open_drafter(str(tmp_path / "target"))
    fresh(target, "hydra").save_pretrained(tmp_path / "hydra")
    weights = tmp_path / "hydra" / "model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if "heads.0" not in k}, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"not a whole drafter: heads\.0.* missing"):
        open_drafter(str(tmp_path / "hydra"))
    assert method_of(open_drafter("prompt_lookup")) == "prompt_lookup"
    assert isinstance(open_drafter("prompt_lookup"), PromptLookup)


def test_every_method_says_its_own_type() -> None:
    for method in TRAINED.values():
        assert method.drafter.config_class.model_type == method.model_type
