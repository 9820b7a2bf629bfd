"""DFlash 2: its convolutions and selector as the authors write them, its start as DFlash, published folders."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as fn

from ctc_drafter.decode.generate import generate, plain_generate
from ctc_drafter.drafters.baselines.dflash2 import ConvolutionPair, DFlash2Config, DFlash2Drafter
from ctc_drafter.drafters.registry import fresh_drafter, method_of, trained_method
from ctc_drafter.drafters.trainable import LossInputs, LossOptions
from ctc_drafter.drafters.warm_start import AutoDrafter, read_start
from ctc_drafter.types import UserError
from helpers import VOCABULARY, paths, tiny_target

LENGTH = 3


def fresh(target, seed: int = 0, **sizes) -> DFlash2Drafter:
    """Untrained, spread out so that its parts matter."""
    torch.manual_seed(seed)
    drafter = DFlash2Drafter.for_target(target.config, **{"draft_length": LENGTH, "mask_token_id": 7, **sizes})
    with torch.no_grad():
        for weight in drafter.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return drafter.eval()


def convolved(states: torch.Tensor, corrections: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """out_t = sum over taps of (base + correction of the channel's group) x_(t - tap), place by place, of one block.

    states `[T, H]`, corrections `[T, taps, groups]`, base `[taps, H]`.
    """
    (length, width), (taps, groups) = states.shape, corrections.shape[1:]
    out = torch.zeros_like(states)
    for place, tap, channel in itertools.product(range(length), range(taps), range(width)):
        if place >= tap:
            kernel = base[tap, channel] + corrections[place, tap, channel // (width // groups)]
            out[place, channel] += kernel * states[place - tap, channel]
    return out


@torch.inference_mode()
@pytest.mark.parametrize("taps", [1, 2, 3])
def test_convolutions_of_blocks_that_do_not_see_each_other(taps: int) -> None:
    torch.manual_seed(0)
    pair = ConvolutionPair(8, taps, 4)
    pair.base_kernel.normal_()
    pair.kernel_projection.weight.normal_()
    states, output = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    found, kept = pair.before(states, 3)
    after = pair.after(output, kept, 3)
    for row, block in itertools.product(range(2), range(2)):
        part = slice(3 * block, 3 * block + 3)
        dynamic = fn.linear(states[row, part], pair.kernel_projection.weight).view(3, 2, taps, 2)
        torch.testing.assert_close(found[row, part], convolved(states[row, part], dynamic[:, 0], pair.base_kernel[0]))
        torch.testing.assert_close(after[row, part], convolved(output[row, part], dynamic[:, 1], pair.base_kernel[1]))


@torch.inference_mode()
def test_it_starts_as_dflash() -> None:
    target = tiny_target()
    torch.manual_seed(0)
    dflash = trained_method("dflash").drafter.for_target(target.config, draft_length=LENGTH, mask_token_id=7).eval()
    mine = DFlash2Drafter.for_target(target.config, draft_length=LENGTH, mask_token_id=7).eval()
    report = mine.load_state_dict(dflash.state_dict(), strict=False)
    assert not report.unexpected_keys
    assert {name.partition(".")[0] for name in report.missing_keys} == {"layers", "candidate_selector"}
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9]])
    features = target.hidden_features(tokens, mine.feature_layers)
    found, expected = (
        each.draft_states(features, tokens, torch.tensor([[2, 4]]), target.embed) for each in (mine, dflash)
    )
    torch.testing.assert_close(found, expected)


@torch.inference_mode()
def test_the_tree_holds_the_products_over_candidates() -> None:
    """Frame by frame: the top tokens, their logits plus the pair's score, normalised over these alone."""
    target = tiny_target()
    drafter = fresh(target, selector_top_k=4, selector_rank=8)
    selector = drafter.candidate_selector
    selector.predecessor_codebook.mul_(20)
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9]])
    features = target.hidden_features(tokens, drafter.feature_layers)
    blocks = drafter.draft_states(features, tokens, torch.tensor([[4]]), target.embed)[:, 0]
    logits = blocks[0, 1:] @ target.head.weight.T
    top = [frame.topk(4) for frame in logits]
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for size in range(LENGTH):
        for prefix in [each for each in expected if len(each) == size]:
            last = (5, *prefix)[-1]
            gated = selector.predecessor_codebook[last] * (selector.hidden_projection.weight @ blocks[0, 1 + size])
            scores = top[size].values + selector.successor_codebook[top[size].indices] @ gated
            for token, share in zip(top[size].indices.tolist(), scores.softmax(-1).tolist(), strict=True):
                expected[(*prefix, token)] = expected[prefix] * share
    del expected[()]
    heads = drafter.prepared(target.embed, target.head)
    exact = type(heads)(target.embed, target.head, drafter.outputs(target.head))
    found = paths(drafter.candidates(blocks, torch.tensor([5]), exact, nodes=200))
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-3)
    best = paths(drafter.candidates(blocks, torch.tensor([5]), exact, nodes=6))
    for prefix in sorted(expected, key=lambda each: -expected[each])[:6]:
        assert best[prefix] == pytest.approx(expected[prefix], rel=1e-3)
    rows = torch.tensor([[5, *prefix] for prefix in expected if len(prefix) == LENGTH])
    steps = drafter.log_probs(blocks.expand(len(rows), -1, -1), rows, target.embed, target.head).cumsum(1).exp()
    for row, shares in zip(rows[:, 1:].tolist(), steps.tolist(), strict=True):
        assert shares == pytest.approx([expected[tuple(row[: u + 1])] for u in range(LENGTH)], rel=1e-3)


@torch.inference_mode()
def test_the_loss_puts_the_label_in_the_weakest_candidates_place() -> None:
    target = tiny_target()
    drafter = fresh(target, selector_top_k=4)
    states = torch.randn(1, 1 + LENGTH, target.hidden_size)
    logits = (states[:, 1:] @ target.head.weight.T).float()
    order = logits.argsort(-1, descending=True)
    prefixes = torch.stack([torch.tensor([5]), order[:, 0, 1], order[:, 1, 50], order[:, 2, 3]], 1)
    found = drafter.selected(states, logits, prefixes)
    selector = drafter.candidate_selector
    for u, kept in enumerate((order[0, 0, :4], torch.cat([order[0, 1, :3], prefixes[0, 2:3]]), order[0, 2, :4])):
        gated = selector.predecessor_codebook[prefixes[0, u]] * (selector.hidden_projection.weight @ states[0, 1 + u])
        scores = logits[0, u, kept] + selector.successor_codebook[kept] @ gated
        place = kept.tolist().index(int(prefixes[0, 1 + u]))
        assert float(found[0, u]) == pytest.approx(float(scores.log_softmax(-1)[place]), rel=1e-4)
    inputs = LossInputs(states, prefixes, torch.ones(1, LENGTH, dtype=torch.bool))
    frames = -fn.cross_entropy(logits[0], prefixes[0, 1:], reduction="none")
    loss = drafter.loss(inputs, target.embed, target.head, LossOptions("prefix", 1.0))
    assert float(loss) == pytest.approx(-float(frames.mean() + found.mean()), rel=1e-4)
    soft = LossInputs(states, prefixes, inputs.valid, last=torch.randn(1, LENGTH, target.hidden_size))
    teacher = (soft.last @ target.head.weight.T).softmax(-1)
    frames = (teacher * logits.log_softmax(-1)).sum(-1)
    loss = drafter.loss(soft, target.embed, target.head, LossOptions("teacher", 1.0))
    assert float(loss) == pytest.approx(-float(frames.mean() + found.mean()), rel=1e-4)


def published(target, **changes: Any) -> dict[str, Any]:
    """A config.json as z-lab's Qwen3.8-27B-DFlash2 has it, of a tiny target."""
    config = target.config
    own = {"block_size": 1 + LENGTH, "conv_group_size": 8, "conv_kernel_size": 2, "mask_token_id": 7}
    own |= {"selector_rank": 6, "selector_top_k": 5, "target_layer_ids": [1]}
    theirs = {
        "architectures": ["DFlash2DraftModel"],
        "model_type": "qwen3",
        "attention_bias": False,
        "dtype": "float32",
        "hidden_act": "silu",
        "is_causal": False,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": 2,
        "num_target_layers": config.num_hidden_layers,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "sliding_window": 2048,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention"] * 2,
        "tie_word_embeddings": False,
        "dflash_config": own | changes.pop("dflash_config", {}),
    }
    return theirs | changes


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published checkpoint's tensors."""
    own, hidden, vocabulary = config["dflash_config"], config["hidden_size"], config["vocab_size"]
    heads, kv = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    mlp, rank, taps = config["intermediate_size"], own["selector_rank"], own["conv_kernel_size"]
    found = {
        "fc.weight": (hidden, hidden * len(own["target_layer_ids"])),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
        "candidate_selector.hidden_projection.weight": (rank, hidden),
        "candidate_selector.predecessor_codebook": (vocabulary, rank),
        "candidate_selector.successor_codebook": (vocabulary, rank),
    }
    for layer in range(config["num_hidden_layers"]):
        parts = {
            "self_attn.q_proj.weight": (heads, hidden),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.v_proj.weight": (kv, hidden),
            "self_attn.o_proj.weight": (hidden, heads),
            "self_attn.q_norm.weight": (config["head_dim"],),
            "self_attn.k_norm.weight": (config["head_dim"],),
            "mlp.gate_proj.weight": (mlp, hidden),
            "mlp.up_proj.weight": (mlp, hidden),
            "mlp.down_proj.weight": (hidden, mlp),
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }
        for conv in ("attention_conv", "mlp_conv"):
            parts[f"{conv}.base_kernel"] = (2, taps, hidden)
            parts[f"{conv}.kernel_projection.weight"] = (2 * taps * hidden // own["conv_group_size"], hidden)
        found |= {f"layers.{layer}.{name}": shape for name, shape in parts.items()}
    return found


def write(folder: Path, config: dict[str, Any], without: str = "") -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    tensors = {name: 0.2 * torch.randn(shape) for name, shape in shapes(config).items() if name != without}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def test_a_published_folder_opens_and_drafts(tmp_path: Path) -> None:
    target = tiny_target(initializer_range=0.02)
    tensors = write(tmp_path / "theirs", published(target))
    drafter = AutoDrafter.from_pretrained(tmp_path / "theirs", target)
    assert isinstance(drafter, DFlash2Drafter)
    assert method_of(drafter) == "dflash2"
    config = drafter.config
    assert (config.draft_length, config.mask_token_id, config.rope_theta) == (LENGTH, 7, 5000.0)
    assert (config.selector_rank, config.selector_top_k, config.conv_group_size) == (6, 5, 8)
    state = drafter.state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    plain = plain_generate(target, prompts, max_new_tokens=16).tokens
    assert generate(target, drafter, prompts, max_new_tokens=16, nodes=8, min_probability=0.0).tokens == plain
    drafter.save_pretrained(tmp_path / "ours")
    again = AutoDrafter.from_pretrained(tmp_path / "ours", target)
    assert isinstance(again, DFlash2Drafter)
    start = read_start(str(tmp_path / "theirs"))
    begun = fresh_drafter(target, None, 0, "dflash", **start.sizes("dflash"))
    start.give_to(begun)  # its layers serve others, too
    assert torch.equal(begun.fc.weight, tensors["fc.weight"])


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    target = tiny_target()
    write(tmp_path / "a", published(target), without="candidate_selector.successor_codebook")
    with pytest.raises(UserError, match="successor_codebook is missing; download it again"):
        AutoDrafter.from_pretrained(tmp_path / "a", target)
    write(tmp_path / "b", published(target, is_causal=True))
    with pytest.raises(UserError, match="causal blocks"):
        AutoDrafter.from_pretrained(tmp_path / "b", target)
    write(tmp_path / "c", published(target))
    (tmp_path / "c" / "config.json").write_text(json.dumps(published(target, dflash_config={"selector_top_k": None})))
    with pytest.raises(UserError, match="selector_top_k is missing or wrong"):
        AutoDrafter.from_pretrained(tmp_path / "c", target)


def test_sizes_that_cannot_be() -> None:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "draft_length": 3}
    for wrong, said in (
        ({"conv_group_size": 5}, "does not divide hidden_size 64"),
        ({"conv_kernel_size": 5}, "give 1 to 4"),
        ({"selector_rank": 0}, "train dflash"),
        ({"selector_top_k": 98}, "give 1 to 97"),
        ({"convolution": True}, "convolutions of its own"),
    ):
        with pytest.raises(UserError, match=said):
            DFlash2Config(**sizes, **wrong)
    assert math.gcd(16, 64) == DFlash2Drafter.for_target(tiny_target().config).config.conv_group_size
