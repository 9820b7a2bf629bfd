import json

import pytest
import torch
import transformers
from transformers import DynamicCache

from ctc_drafter.target.chain_test import Chain
from ctc_drafter.target.features import decoder_blocks
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError
from helpers import VOCABULARY, tiny_target

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def refused(config, model_class=transformers.AutoModelForCausalLM):
    with pytest.raises(UserError) as error:
        Target.wrap(model_class.from_config(config))
    return str(error.value)


def test_features_are_block_outputs_before_the_final_norm():
    target = tiny_target()
    tokens = torch.tensor([[1, 2, 3]])
    features = target.hidden_features(tokens, (0, 2))
    assert not any(block._forward_hooks for block in decoder_blocks(target.model))
    with torch.no_grad():
        everything = target.model(tokens, output_hidden_states=True).hidden_states
        torch.testing.assert_close(features[..., :64], everything[1])
        torch.testing.assert_close(target.model.model.norm(features[..., 64:]), everything[3])


def test_hooks_go_away_after_an_error():
    target = tiny_target()
    with pytest.raises(IndexError):
        target.forward(torch.tensor([[10**6]]), torch.tensor([[0]]), DynamicCache(), layers=(0,))
    assert not any(block._forward_hooks for block in decoder_blocks(target.model))


def test_the_norm_scale_is_the_final_norms():
    target = tiny_target()
    target.model.model.norm.weight.data.uniform_(0.5, 2.0)
    torch.testing.assert_close(target.norm_scale, target.model.model.norm.weight.data, atol=1e-5, rtol=1e-5)


def test_encoder_decoders_are_refused():
    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    assert "encoder-decoder" in refused(config, transformers.AutoModelForSeq2SeqLM)


def test_what_can_follow_no_tree_follows_chains():
    """Recurrent and hybrid ones, and alibi, which counts slots; exact: see test_chains.py."""
    mamba = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
    hybrid = transformers.Qwen3NextConfig(
        **SIZES, num_key_value_heads=2, head_dim=8, intermediate_size=32, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=16, shared_expert_intermediate_size=16, linear_num_value_heads=2,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    bloom = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    falcon = transformers.FalconConfig(**SIZES, alibi=True)
    for config, way in ((mamba, Chain(stepped=True)), (hybrid, Chain()), (bloom, Chain()), (falcon, Chain())):
        assert Target.wrap(transformers.AutoModelForCausalLM.from_config(config).eval()).chain == way
    assert tiny_target().chain is None


def test_what_follows_neither_is_refused_with_both_reasons():
    config = transformers.RwkvConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)
    reason = refused(config)
    assert "cannot follow a tree" in reason
    assert "over a chain" in reason


def test_kernels_without_tree_masks_are_refused():
    model = tiny_target().model
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UserError, match="flex_attention"):
        Target.wrap(model)


def test_missing_and_corrupt_checkpoints_are_named(tmp_path):
    with pytest.raises(UserError, match="no causal LM could be loaded from"):
        Target.load(str(tmp_path / "missing"))
    tiny_target().model.save_pretrained(tmp_path)
    assert Target.load(str(tmp_path)).num_layers == 3
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:300])
    with pytest.raises(UserError, match="corrupt"):
        Target.load(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    with pytest.raises(UserError, match="no causal LM could be loaded from"):
        Target.load(str(tmp_path))
