"""Published EAGLE-3 heads: both formats, against their forward pass written out from the authors' code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ctc_drafter import AutoDrafter, Eagle3Drafter, Speculator, Target, UserError
from ctc_drafter.drafters.registry import method_of, trained_method
from ctc_drafter.drafters.warm_start import is_published, read_start
from ctc_drafter.load import load_drafter
from ctc_drafter.train.validate import offline_beta
from eagle3_heads import (
    CASES,
    DRAFTED,
    LAYERS,
    TEXT,
    VOCABULARY,
    WIDTH,
    Theirs,
    compare,
    made,
    of_speculators,
    of_the_authors,
    tensors_of,
    write,
)
from tiny_models import tiny_llama, tiny_tokenizer
from train_helpers import written_rows


@pytest.fixture(scope="module")
def target() -> Target:
    return Target.wrap(tiny_llama(layers=LAYERS))


@pytest.mark.sparing(4)
@pytest.mark.parametrize("case", CASES)
def test_drafts_are_those_of_the_authors_forward(case: str, target: Target, tmp_path: Path) -> None:
    name, tensors, prefix, flags, inputs_of = made(case, tmp_path)
    assert is_published(name)
    drafter = AutoDrafter.from_pretrained(name, target)
    assert isinstance(drafter, Eagle3Drafter)
    assert method_of(drafter) == "eagle3"
    assert drafter.feature_layers == tuple(block - 1 for block in inputs_of)
    compare(target, drafter, Theirs(tensors, prefix, target.embed.weight, **flags), inputs_of)
    drafter.save_pretrained(tmp_path / "ours")  # and opens again, without its target
    assert not is_published(str(tmp_path / "ours"))
    again = AutoDrafter.from_pretrained(tmp_path / "ours")
    assert isinstance(again, Eagle3Drafter)
    compare(target, again, Theirs(tensors, prefix, target.embed.weight, **flags), inputs_of)


@pytest.mark.parametrize("case", ["authors", "speculators, norm before fc"])
def test_decoding_is_lossless(case: str, target: Target, tmp_path: Path) -> None:
    name = made(case, tmp_path)[0]
    rows = torch.tensor([TEXT, [0, 0, 0, 0, 0, 7, 8, 9, 7]])
    given: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    given["attention_mask"] = (rows != 0).long()
    expected = target.model.generate(rows, **given)
    for model in (target.model, target):
        fast = Speculator(model, name, nodes=12, min_probability=0.0)
        assert torch.equal(fast.generate(rows, **given), expected)
        assert fast.stats.steps > 0
    loaded = load_drafter(name, target, tiny_tokenizer())  # as --drafter does
    assert torch.equal(Speculator(target, loaded, nodes=12).generate(rows, **given), expected)


def test_right_drafts_are_accepted(target: Target, tmp_path: Path) -> None:
    """A head that always says the same token, in trees of one node: right where the answer has that token next."""
    drafter = AutoDrafter.from_pretrained(made("authors", tmp_path)[0], target)
    given: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    answer = target.model.generate(torch.tensor([TEXT]), **given)[0, len(TEXT) :].tolist()
    said = answer[7]
    with torch.no_grad():
        drafter.lm_head.weight.zero_()
        drafter.norm.weight.zero_()
        drafter.d2t[0] = said  # of equal logits the first is drafted
    fast = Speculator(target, drafter, nodes=1, min_probability=0.0)
    fast.generate(torch.tensor([TEXT]), **given)
    place, accepted = 1, []  # by hand: a step drafts one token, and emits it and the next where it is right
    while place < len(answer):
        accepted.append(answer[place] == said)
        place += 1 + accepted[-1]
    assert fast.stats.accept_histogram == [accepted.count(False), accepted.count(True)]
    assert any(accepted)


def test_an_embedding_of_its_own(target: Target, tmp_path: Path) -> None:
    """A copy of the target's is not kept twice; another one is read."""
    tensors = tensors_of("midlayer")
    copied = tensors | {"embed_tokens.weight": target.embed.weight.detach().clone()}
    drafter = AutoDrafter.from_pretrained(write(tmp_path / "copy", copied, of_the_authors()), target)
    assert not drafter.config.own_embedding
    own = tensors | {"embed_tokens.weight": torch.randn(VOCABULARY, WIDTH)}
    drafter = AutoDrafter.from_pretrained(write(tmp_path / "own", own, of_the_authors()), target)
    assert drafter.config.own_embedding
    compare(target, drafter, Theirs(own, "midlayer", target.embed.weight), [2, 4, 5])


def test_a_file_of_torch_and_half_precision(target: Target, tmp_path: Path) -> None:
    """As the first heads were published: pytorch_model.bin, float16."""
    tensors = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors_of("midlayer").items()
    }
    drafter = AutoDrafter.from_pretrained(write(tmp_path, tensors, of_the_authors(), "pytorch_model.bin"), target)
    assert drafter.dtype == torch.float32
    read = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    compare(target, drafter, Theirs(read, "midlayer", target.embed.weight), [2, 4, 5])


WRONG = {
    "two layers": (of_the_authors(num_hidden_layers=2), {}, "head with 2 layers, which cannot be read yet"),
    "act": (of_the_authors(hidden_act="gelu"), {}, "gelu in place of silu"),
    "mlp bias": (of_the_authors(mlp_bias=True), {}, "biases in its MLP"),
    "narrow": (of_the_authors(target_hidden_size=128), {}, "layers of width 64 for a target of 128"),
    "parallel": (of_the_authors(parallel_drafting=True), {}, "parallel drafting"),
    "kind": (of_speculators("gpt2"), {}, "a layer of gpt2; EAGLE-3 heads of llama and qwen3 layers can be read"),
    "embeddings": (of_speculators(eagle_aux_hidden_state_layer_ids=[0, 2, 3]), {}, "the target's embeddings as"),
    "too deep": (of_speculators(eagle_aux_hidden_state_layer_ids=[1, 2, 9]), {}, "must name blocks 0..7"),
    "dynamic": (
        of_the_authors(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), {}, "rotary positions by dynamic",
    ),
    "size": (of_the_authors(hidden_size="wide"), {}, "config.json is not EAGLE-3's"),
    "layers in words": (of_speculators(eagle_aux_hidden_state_layer_ids="all"), {}, "config.json is not EAGLE-3's"),
    "no layer": (of_speculators() | {"transformer_layer_config": [1]}, {}, "config.json is not EAGLE-3's"),
    "eagle_config": (of_the_authors(eagle_config="yes"), {}, "config.json is not EAGLE-3's"),
    "rope": (of_the_authors(rope_scaling={"rope_type": "llama3"}), {}, "config.json is not EAGLE-3's"),
    "flat head": (of_the_authors(), {"lm_head.weight": torch.tensor(1.0)}, "d2t|lm_head"),
    "vocabulary": (of_the_authors(vocab_size=300), {}, "a target with vocabulary 300, this one has 280"),
    "shape": (of_the_authors(intermediate_size=99), {}, r"layer.mlp.down_proj.weight is \(64, 48\)"),
    "d2t": (of_the_authors(), {"d2t": torch.full((DRAFTED,), 270)}, r"d2t\) of .* names tokens that do not exist"),
    "short d2t": (of_the_authors(), {"d2t": torch.zeros(3, dtype=torch.long)}, "names tokens that do not exist"),
    "no d2t": (of_the_authors(), {"d2t": None}, "d2t is missing"),
    "no head": (of_the_authors(), {"lm_head.weight": None}, "lm_head.weight is missing"),
    "no norm": (of_the_authors(), {"norm.weight": None}, "norm.weight is missing"),
    "unknown": (of_the_authors(), {"mask_hidden": torch.zeros(1, 3)}, "holds mask_hidden, which EAGLE-3 heads"),
    "bias": (of_the_authors(), {"midlayer.self_attn.q_proj.bias": torch.zeros(64)}, "holds layer.self_attn.q_proj"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_heads_that_cannot_be_read_say_why(case: str, target: Target, tmp_path: Path) -> None:
    config, changes, message = WRONG[case]
    prefix = "layers.0" if "speculators_config" in config else "midlayer"
    tensors = {name: tensor for name, tensor in (tensors_of(prefix) | changes).items() if tensor is not None}
    with pytest.raises(UserError, match=message) as caught:
        AutoDrafter.from_pretrained(write(tmp_path, tensors, config), target)
    assert "\n" not in str(caught.value)
    assert ("is not EAGLE-3's" in str(caught.value)) == ("is not EAGLE-3's" in message)


def test_without_a_target_it_says_that_one_is_needed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="in its authors' format, and needs its target"):
        AutoDrafter.from_pretrained(made("authors", tmp_path)[0])


def test_it_is_not_trained(target: Target, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="read from published heads and not trained; use --method eagle"):
        trained_method("eagle3")
    name = made("authors", tmp_path)[0]
    assert read_start(name).method == "eagle3"
    drafter = AutoDrafter.from_pretrained(name, target)
    with pytest.raises(UserError, match="used as they are published; train with --method eagle"):
        drafter.check_loss("prefix")


def test_validation_asks_as_a_session_does(target: Target, tmp_path: Path) -> None:
    drafter = AutoDrafter.from_pretrained(made("authors", tmp_path)[0], target)
    rows = written_rows(target, 3)
    whole = offline_beta(target, drafter, rows, nodes=(4,))
    assert offline_beta(target, drafter, rows, nodes=(4,), chunk=5, batch_size=2) == whole
