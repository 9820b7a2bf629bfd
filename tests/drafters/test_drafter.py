import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ctc_drafter.decode.prefill import prefill
from ctc_drafter.drafters.block import Carry, block_mask
from ctc_drafter.drafters.ctc import CTCDrafter, CTCDrafterConfig
from ctc_drafter.types import UserError
from helpers import VOCABULARY, tiny_config, tiny_drafter, tiny_target

T, F = True, False
ROWS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [2, 7, 1, 8, 2, 8], [1, 6, 1, 8]]


def test_the_block_mask_as_a_matrix():
    assert block_mask(torch.tensor([[1, 2]]), length=3, size=2)[0, 0].tolist() == [
        [T, F, F, T, T, F, F],
        [T, F, F, T, T, F, F],
        [T, T, F, F, F, T, T],
        [T, T, F, F, F, T, T],
    ]


def carrying(target, carry, rank=0, root=False, **sizes):
    """A drafter whose places carry something of their own, which a fresh one's do not."""
    drafter = tiny_drafter(target, carry=carry, carry_rank=rank, carry_root=root, **sizes)
    with torch.no_grad():
        for each in (drafter.carry, drafter.carry_root):
            for weight in () if each is None else each.parameters():
                weight.normal_(std=0.5)
    return drafter


CARRIES = pytest.mark.parametrize(
    ("carry", "rank", "root"), [(False, 0, False), (True, 0, False), (True, 2, False), (True, 2, True)]
)


@CARRIES
@pytest.mark.parametrize("layers", [1, 2])
@torch.inference_mode()
def test_a_session_drafts_what_training_saw(layers, carry, rank, root):
    """Blocks over a whole row at once, as in training, against a session that is fed step by step."""
    target = tiny_target()
    drafter = carrying(target, carry, rank, root, num_hidden_layers=layers)
    state = prefill(target, ROWS, drafter.feature_layers)
    session = drafter.begin(target.embed, target.head, len(ROWS))
    start, cuts = torch.tensor([3, 1, 2]), torch.tensor([4, 3, 1])
    session.extend(state.tokens[:, :3], state.features[:, :3], start)
    session.propose(state.tokens[:, 0], 4)  # a draft in between must leave no trace
    index = (start.unsqueeze(1) + torch.arange(4)).clamp(max=state.tokens.shape[1] - 1)
    features = state.features.gather(1, index.unsqueeze(-1).expand(-1, -1, state.features.shape[-1]))
    session.extend(state.tokens.gather(1, index), features, cuts)

    anchors = (start + cuts).unsqueeze(1)
    blocks = drafter.draft_states(state.features, state.tokens, anchors, target.embed)
    root = state.tokens.gather(1, anchors).squeeze(1)
    expected = drafter.candidates(blocks[:, 0], root, session.head, nodes=8)
    found = session.propose(root, 8)
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.scores, expected.scores, atol=2e-5, rtol=0)

    session.select(torch.tensor([2, 0]))
    again = session.propose(root[[2, 0]], 8)
    assert torch.equal(again.tokens, expected.tokens[[2, 0]])


@torch.no_grad()
def test_what_places_carry_by_hand():
    """Two places of width 2, rank 1: W h + (own vector) + (own map of rank 1) h, place by place."""
    carry = Carry(2, places=2, rank=1)
    newest = torch.tensor([[2.0, 3.0]])
    carry.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
    torch.testing.assert_close(carry(newest).expand(1, 2, 2), torch.tensor([[[2.0, -3.0], [2.0, -3.0]]]))
    carry.down.weight.copy_(torch.tensor([[1.0, 1.0]]))  # 5
    carry.up.copy_(torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]]))
    carry.own.copy_(torch.tensor([[0.0, 0.5], [0.25, 0.0]]))
    expected = torch.tensor([[[2.0 + 5.0, -3.0 + 0.5], [2.0 + 0.25, -3.0 + 10.0]]])
    torch.testing.assert_close(carry(newest), expected)
    torch.testing.assert_close(carry(newest, 1), expected[:, :1])


def test_places_that_carry_start_as_if_they_did_not():
    """So that a drafter that was trained without goes on as it was; and each place learns from the first step on."""
    target = tiny_target()
    plain, more = tiny_drafter(target, carry=True), tiny_drafter(target, carry=True, carry_rank=3)
    missing = more.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing == ["carry.up", "carry.own", "carry.down.weight"]
    given = torch.tensor([5]), torch.randn(1, plain.config.hidden_size), target.embed
    torch.testing.assert_close(more.block_states(*given), plain.block_states(*given))
    more.block_states(*given).square().sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in (more.carry.up, more.carry.own))


@torch.no_grad()
def test_what_the_root_says_is_added_to_each_place():
    target = tiny_target()
    plain = tiny_drafter(target, carry=True, carry_rank=3)
    more = tiny_drafter(target, carry=True, carry_rank=3, carry_root=True)
    more.load_state_dict(plain.state_dict(), strict=False)
    more.start_from(None, target.head)
    root, newest = torch.tensor([5, 7]), torch.randn(2, plain.config.hidden_size)
    states = plain.block_states(root, newest, target.embed)
    torch.testing.assert_close(more.block_states(root, newest, target.embed), states)  # a fresh one says nothing
    for weight in more.carry_root.parameters():
        weight.normal_()
    expected = states + more.carry_root(target.embed(root))
    torch.testing.assert_close(more.block_states(root, newest, target.embed), expected)
    assert not torch.allclose(expected, states)


def test_a_rank_or_a_root_without_a_carry_is_refused():
    with pytest.raises(UserError, match="carry_root is set without carry"):
        CTCDrafterConfig(carry_root=True)
    with pytest.raises(UserError, match="set carry, or carry_rank to 0"):
        CTCDrafterConfig(carry_rank=2)
    with pytest.raises(UserError, match="carry_rank is -1"):
        CTCDrafterConfig(carry=True, carry_rank=-1)


@CARRIES
@torch.inference_mode()
def test_later_tokens_do_not_reach_a_block(carry, rank, root):
    target = tiny_target()
    drafter = carrying(target, carry, rank, root)
    tokens = torch.tensor([ROWS[0]])
    features = target.hidden_features(tokens, drafter.feature_layers)
    anchors = torch.tensor([[4]])
    before = drafter.draft_states(features, tokens, anchors, target.embed)
    spoilt, other = features.clone(), tokens.clone()
    spoilt[:, 4:], other[:, 5:] = 7.0, 0
    torch.testing.assert_close(drafter.draft_states(spoilt, other, anchors, target.embed), before)
    spoilt[:, 3] = 7.0
    assert not torch.allclose(drafter.draft_states(spoilt, other, anchors, target.embed), before)


@pytest.mark.parametrize("width", [0, 256], ids=["table alone", "with the MLP"])
@torch.inference_mode()
def test_the_search_scores_what_the_loss_trains(width):
    """Prefix probabilities of the lattice equal the scores of the search, but for its int8 matrix."""
    from ctc_drafter.ctc.loss import prefix_log_probs

    target = tiny_target()
    drafter = tiny_drafter(target, predictor_width=width)
    tokens = torch.tensor([ROWS[0]])
    features = target.hidden_features(tokens, drafter.feature_layers)
    blocks = drafter.draft_states(features, tokens, torch.tensor([[4]]), target.embed)[:, 0]
    exact = replace(drafter.prepared(target.embed, target.head), head=target.head)
    found = drafter.candidates(blocks, tokens[:, 4], exact, nodes=6)
    for node in range(found.tokens.shape[1]):
        path = []
        while node >= 0:
            path.append(node)
            node = int(found.parents[0, node])
        prefix = found.tokens[:, path[::-1]]
        lattice = drafter.lattice(blocks, torch.cat([tokens[:, 4:5], prefix], 1), target.embed, target.head)
        scores = prefix_log_probs(lattice, prefix)[0]
        torch.testing.assert_close(scores, found.scores[0, path[::-1]], atol=1e-3, rtol=0)


def test_tensor_names_are_those_of_the_dflash_layout():
    drafter = tiny_drafter(tiny_target())
    layer = {
        f"layers.0.{name}.weight"
        for name in (
            *(f"self_attn.{p}_proj" for p in "qkvo"),
            "self_attn.q_norm",
            "self_attn.k_norm",
            *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
            "input_layernorm",
            "post_attention_layernorm",
        )
    }
    ours = {"blank_head.weight", "blank_head.bias", "predictor.root.bias"} | {
        f"predictor.{name}.weight" for name in ("table", "previous", "last", "root", "inner", "output")
    }
    ours |= {"fc.weight", "hidden_norm.weight", "norm.weight"} | layer
    assert set(drafter.state_dict()) == ours
    more = tiny_drafter(tiny_target(), carry=True, draft_vocab_size=9)
    assert set(more.state_dict()) == ours | {"carry.weight", "d2t"}


def test_the_head_a_session_reads_is_never_the_targets_changed():
    target = tiny_target()
    before = target.head.weight.clone()
    session = tiny_drafter(target).begin(target.embed, target.head, 1)
    assert target.head.weight.dtype == torch.float32
    assert torch.equal(target.head.weight, before)
    torch.testing.assert_close(session.head.head.weight.float(), before, atol=0, rtol=1e-2)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    target = tiny_target()
    drafter = tiny_drafter(target)
    drafter.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors", "custom_generate"}
    loaded = CTCDrafter.from_pretrained(tmp_path)
    assert loaded.config.to_dict().keys() == drafter.config.to_dict().keys()
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


def saved(tmp_path):
    tiny_drafter(tiny_target()).save_pretrained(tmp_path)
    return tmp_path


def test_bad_checkpoints_are_named(tmp_path):
    with pytest.raises(UserError, match="no drafter could be loaded from"):
        CTCDrafter.from_pretrained(tmp_path / "missing")
    folder = saved(tmp_path)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if k != "fc.weight"}, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"fc\.weight"):
        CTCDrafter.from_pretrained(folder)
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(UserError, match="no drafter could be loaded from"):
        CTCDrafter.from_pretrained(folder)


def test_unknown_config_keys_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"'frame'.*did you mean 'frames'"):
        CTCDrafterConfig(frame=4)
    folder = saved(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "beam": 3}))
    with pytest.raises(UserError, match="'beam'"):
        CTCDrafter.from_pretrained(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"draft_length": 9, "frames": 8}, "draft_length"),
        ({"target_layer_ids": [40]}, "target_layer_ids"),
        ({"mask_token_id": 32000}, "mask_token_id"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
    ],
)
def test_impossible_configs_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        CTCDrafterConfig(**values)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"hidden_size": 128}, "hidden size 64"),
        ({"vocab_size": VOCABULARY + 1}, "vocabulary 97"),
        ({"num_hidden_layers": 4}, "layer count 3"),
    ],
)
def test_another_targets_drafter_is_refused(other, message):
    drafter = tiny_drafter(tiny_target(), target_fingerprint="abc")
    drafter.check_target(tiny_config(), "abc")
    with pytest.raises(UserError, match=message):
        drafter.check_target(tiny_config(**other))
    with pytest.raises(UserError, match="tokenizer"):
        drafter.check_target(tiny_config(), "xyz")


@torch.inference_mode()
def test_without_a_predictor_frames_are_independent():
    target = tiny_target()
    drafter = tiny_drafter(target, predictor_rank=0)
    assert drafter.predictor is None
    session = drafter.begin(target.embed, target.head, 1)
    state = prefill(target, ROWS[:1], drafter.feature_layers)
    session.extend(state.tokens, state.features, state.lengths)
    assert session.propose(state.logits.argmax(-1), 8).scores.isfinite().any()


def test_prepared_heads_are_made_again_only_when_weights_change():
    target = tiny_target()
    drafter = tiny_drafter(target)
    first = drafter.prepared(target.embed, target.head)
    assert drafter.prepared(target.embed, target.head) is first
    with torch.no_grad():
        drafter.predictor.table.weight.mul_(2)
    assert drafter.prepared(target.embed, target.head) is not first
    assert drafter.prepared(tiny_target().embed, target.head) is not first


def test_prepared_heads_follow_a_fused_optimizer():
    target = tiny_target()
    drafter = tiny_drafter(target)
    before = drafter.prepared(target.embed, target.head)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=0.1, fused=True)
    drafter.train()
    drafter.predictor.table.weight.sum().backward()
    optimizer.step()
    drafter.eval()
    assert drafter.prepared(target.embed, target.head) is not before
