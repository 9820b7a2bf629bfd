"""Drafters for other engines: the exported folder, and the head that engines run, against brute force."""

import json
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import Gemma3TextConfig

from ctc_drafter.cli import main
from ctc_drafter.decode.tree import best_chain
from ctc_drafter.drafters.ctc_session import level_by_level
from ctc_drafter.drafters.registry import fresh_drafter
from ctc_drafter.drafters.warm_start import AutoDrafter
from ctc_drafter.integrations.export import embedding_scale, export
from ctc_drafter.integrations.head import CTCHead
from ctc_drafter.integrations.settings import ARCHITECTURE, HeadSettings, check_vllm
from ctc_drafter.integrations.vllm.cpu import expand
from ctc_drafter.load import load_target
from ctc_drafter.types import UserError
from ctc_oracle import prefix_probs, sequence_probs
from helpers import tiny_config, tiny_drafter, tiny_target
from tiny_models import save_pair

SETTINGS = HeadSettings(4, 3, 97, 64, 5, 2, 3)


def exported(tmp_path, **sizes):
    target = tiny_target()
    drafter = tiny_drafter(target, predictor_rank=2, predictor_width=3, mask_token_id=5, **sizes)
    if drafter.config.draft_vocab_size:
        drafter.draft_only(torch.tensor([1, 4, 96]))
    left_out = export(drafter, target.config, "some/target", tmp_path / "out", width=200)
    return target, drafter, json.loads((tmp_path / "out/config.json").read_text()), left_out


def test_the_folder(tmp_path):
    _, drafter, config, left_out = exported(tmp_path, carry=True, carry_rank=2, carry_root=True, draft_vocab_size=3)
    assert left_out == []
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert tensors.keys() == drafter.state_dict().keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in drafter.state_dict().items())
    proposal = config["speculators_config"]["proposal_methods"][0]
    assert proposal["speculative_tokens"] == drafter.config.frames
    assert config["speculators_config"]["verifier"]["name_or_path"] == "some/target"
    assert config["aux_hidden_state_layer_ids"] == [layer + 1 for layer in drafter.config.target_layer_ids]
    layers = config["transformer_layer_config"]
    for name in ("hidden_size", "head_dim", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps"):
        assert layers[name] == getattr(drafter.config, name)
    assert layers["rope_parameters"]["rope_theta"] == drafter.config.rope_theta
    settings = HeadSettings.of(config["ctc_config"])
    assert (settings.carry, settings.carry_rank, settings.carry_root) == (True, 2, True)
    assert (settings.draft_vocab_size, settings.embedding_scale) == (3, 1.0)
    with pytest.raises(UserError, match="is not empty"):
        export(drafter, tiny_config(), "some/target", tmp_path / "out", 8)
    with pytest.raises(UserError, match="train one with --no-convolution"):
        export(tiny_drafter(tiny_target(), convolution=True), tiny_config(), "some/target", tmp_path / "mixed", 8)


@pytest.mark.parametrize("sizes", [{}, {"draft_vocab_size": 3}, {"predictor_rank": 0}])
def test_the_head_finds_the_chain_that_is_worth_most(tmp_path, sizes):
    some = [1, 4, 96]  # brute force wants few tokens: the others are impossible below
    sizes = {"frames": 4, "draft_length": 3, "predictor_rank": 2, "predictor_width": 3, **sizes}
    target = tiny_target()
    drafter = tiny_drafter(target, mask_token_id=5, **sizes)
    if drafter.config.draft_vocab_size:
        drafter.draft_only(torch.tensor(some))
    with torch.no_grad():
        for weight in drafter.parameters():
            weight.normal_(std=0.2)  # all continuations are likely enough to count in a sum of float32
    export(drafter, target.config, "some/target", tmp_path / "out", width=200)
    settings = HeadSettings.of(json.loads((tmp_path / "out/config.json").read_text())["ctc_config"])
    head = CTCHead(settings)
    others = head.take(load_file(tmp_path / "out/model.safetensors").items())
    assert {name.split(".")[0] for name, _ in others} == {"fc", "hidden_norm", "layers", "norm"}

    blocks, root = torch.randn(3, 5, 64), torch.tensor([4, 0, 96])
    logits = torch.full((3, 4, 97), -1e9)
    logits[..., some] = torch.randn(3, 4, 3)
    with torch.no_grad():
        found = head.chains(blocks, root.int(), logits, target.embed)
        for row, token in enumerate(root):
            expected = worth_most(drafter, blocks[row], token, logits[row][:, some], target.embed, some)
            assert found[row].tolist() == [*expected, 5]


@pytest.mark.parametrize("some", [None, [1, 4, 20, 50, 96]])
def test_the_head_has_tied_tables_and_joint_terms(tmp_path, some):
    """Its chains are those of the drafter's own search of the same width."""
    sizes = {"predictor_tied": True, "joint_tokens": 4, "joint_rank": 3, "draft_vocab_size": len(some or [])}
    target = tiny_target()
    drafter = tiny_drafter(target, mask_token_id=5, frames=4, draft_length=3, **sizes)
    if some is not None:
        drafter.draft_only(torch.tensor(some))
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in drafter.parameters():
            weight.normal_(std=0.1)
    assert export(drafter, target.config, "some/target", tmp_path / "out", width=8) == []
    head = CTCHead(HeadSettings.of(json.loads((tmp_path / "out/config.json").read_text())["ctc_config"]))
    head.take(load_file(tmp_path / "out/model.safetensors").items())
    states, root = torch.randn(3, 5, 64), torch.tensor([4, 0, 96])
    with torch.no_grad():
        logits = target.head(states[:, 1:])
        found = head.chains(states, root, logits, target.embed)
        search = level_by_level(drafter.predictor, drafter.joint, 3, target.embed, drafter.vocabulary)
        frames = drafter.frame_logits(states, drafter.narrowed(target.head))
        expected = best_chain(search(*frames, root, states, None, 8, 0.0), 3).tokens
    assert torch.equal(found[:, :3], expected)


def worth_most(drafter, block, root, logits, embed, some):
    """The tokens of the chain of three with the largest sum of prefix probabilities, of all 27."""
    bias = None
    if drafter.predictor is not None:
        of = drafter.predictor.search_bias(block[:1], embed)

        def bias(prefix):
            text = [-1, int(root), *(some[token] for token in prefix)]
            values = of(torch.tensor([[[text[-1], text[-2]]]]))[0, 0]
            return (values if len(values) == len(some) else values[some]).tolist()

    blanks = drafter.blank_head(block[1:]).squeeze(-1)
    known = prefix_probs(sequence_probs(logits.tolist(), blanks.tolist(), bias))
    chains = product(range(3), repeat=3)
    best = max(chains, key=lambda chain: sum(known.get(chain[:length], 0.0) for length in (1, 2, 3)))
    return [some[token] for token in best]


def test_missing_tensors_and_unknown_keys_are_named():
    with pytest.raises(UserError, match="no tensor blank_head\\.bias"):
        CTCHead(SETTINGS).take([])
    with pytest.raises(UserError, match="no ctc_config"):
        HeadSettings.of(None)
    with pytest.raises(UserError, match="unknown key 'copies'"):
        HeadSettings.of({"copies": 1})
    with pytest.raises(UserError, match="not whole"):
        HeadSettings.of({"frames": 1})


def speculative(**changes):
    good = {"use_local_argmax_reduction": True, "draft_sample_method": "greedy", "num_speculative_tokens": 4}
    return SimpleNamespace(**good | changes)


def test_settings_that_bypass_ctc_are_refused():
    check_vllm(speculative(), 1, SETTINGS)
    for changes, stages, why in [
        ({"use_local_argmax_reduction": False}, 1, "use_local_argmax_reduction"),
        ({"draft_sample_method": "probabilistic"}, 1, "draft_sample_method"),
        ({"num_speculative_tokens": 3}, 1, "must be 4"),
        ({"num_speculative_tokens_per_batch_size": [(1, 2, 3)]}, 1, "num_speculative_tokens_per_batch_size"),
        ({"use_heterogeneous_vocab": True}, 1, "use_heterogeneous_vocab"),
        ({}, 2, "tensor in place of pipeline"),
    ]:
        with pytest.raises(UserError, match=why):
            check_vllm(speculative(**changes), stages, SETTINGS)


def test_scaled_embeddings_are_written_down():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 20}
    gemma = Gemma3TextConfig(num_hidden_layers=1, intermediate_size=8, **sizes)
    assert embedding_scale(gemma) == pytest.approx(4.0)
    assert embedding_scale(tiny_config()) == 1.0


def test_values_are_repeated_for_the_tokens_of_their_request():
    temperatures = torch.tensor([0.5, 0.0, 2.0])
    spread = expand(temperatures, torch.tensor([2, 2, 5], dtype=torch.int32), 5, replace_from=0, replace_to=1)
    assert spread.tolist() == [0.5, 0.5, 2.0, 2.0, 2.0]
    top_k = torch.tensor([7, 9], dtype=torch.int32)
    assert expand(top_k, torch.tensor([1, 3]), 3).tolist() == [7, 9, 9]
    assert expand(temperatures, torch.tensor([1, 3, 3]), 3, replace_from=0, replace_to=1).tolist() == [0.5, 1.0, 1.0]


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    target, drafter = save_pair(tmp_path)
    options = ["--target", str(target), "--drafter", str(drafter), "--out", str(tmp_path / "out")]
    assert main(["export", *options, "--dtype", "float32"]) == 0
    out = tmp_path / "out"
    assert (
        capsys.readouterr().out == f"{out}: speculators, 4 tokens a draft; vllm serve {out} runs it with our plugin\n"
    )
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == [ARCHITECTURE]
    assert config["speculators_config"]["verifier"]["name_or_path"] == str(target)
    assert main(["export", *options]) == 2
    assert "is not empty" in capsys.readouterr().err
    options[3] = "prompt_lookup"
    assert main(["export", *options]) == 2
    assert "prompt_lookup has nothing to export; vLLM has its own" in capsys.readouterr().err
    options[3] = str(out)
    assert main(["export", *options]) == 2
    assert "is in a format that engines read as it is" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_with_a_dflash_drafter(tmp_path, capsys):
    folder, _ = save_pair(tmp_path)
    target, tokenizer = load_target(str(folder), "float32", "cpu")
    fresh_drafter(target, tokenizer, 0, "dflash", draft_length=3).save_pretrained(tmp_path / "dflash")
    options = ["--target", str(folder), "--drafter", str(tmp_path / "dflash"), "--out", str(tmp_path / "out")]
    assert main(["export", *options, "--width", "4"]) == 2
    assert "--width is of a CTC drafter's search" in capsys.readouterr().err
    assert main(["export", *options]) == 0
    assert capsys.readouterr().out.endswith(
        f"3 tokens a draft; vllm serve {tmp_path / 'out'} runs it without a plugin\n"
    )


def test_an_exported_ctc_drafter_is_no_dflash_drafter(tmp_path):
    target, _, _, _ = exported(tmp_path)
    with pytest.raises(UserError, match="was exported for other engines; give the folder of the drafter"):
        AutoDrafter.from_pretrained(str(tmp_path / "out"), target.model)


def test_drafters_that_no_engine_runs_are_refused(tmp_path):
    target = tiny_target()
    for method in ("dspark", "ctc-linear", "medusa"):
        with pytest.raises(UserError, match=f"this one is of {method}"):
            export(fresh_drafter(target, None, 0, method), target.config, "some/target", tmp_path / "out")
    with pytest.raises(UserError, match=r"engines sort the target's layers, and the drafter reads \[1, 0\]"):
        export(dflash(target, target_layer_ids=[1, 0]), target.config, "some/target", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def dflash(target, **sizes):
    options = {"num_hidden_layers": 2, "draft_length": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
    return fresh_drafter(target, None, 0, "dflash", **options, mask_token_id=5, **sizes)


def test_a_dflash_drafter_is_written_for_the_engines_own_class(tmp_path):
    target = tiny_target()
    drafter = dflash(target)
    assert export(drafter, target.config, "some/target", tmp_path / "out") == []
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["DFlashDraftModel"]
    assert config["speculators_model_type"] == config["speculators_config"]["algorithm"] == "dflash"
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 3
    assert (config["block_size"], config["mask_token_id"]) == (4, 5)
    assert config["aux_hidden_state_layer_ids"] == [layer + 1 for layer in drafter.config.target_layer_ids]
    layers = config["transformer_layer_config"]
    assert set(layers["layer_types"]) == {"full_attention"}
    assert layers["sliding_window"] is None
    assert not {"sample_from_anchor", "sliding_window_non_causal"} & config.keys()  # masks follow the root; both ways
    assert "ctc_config" not in config
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert tensors.keys() == drafter.state_dict().keys()
    assert {name.split(".")[0] for name in tensors} == {"fc", "hidden_norm", "layers", "norm"}
    again = AutoDrafter.from_pretrained(str(tmp_path / "out"), target.model)  # as others publish them
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in again.state_dict().items())
    assert again.config.target_layer_ids == drafter.config.target_layer_ids
    assert again.config.draft_length == 3
    with pytest.raises(UserError, match="train one with --no-carry"):
        export(dflash(target, carry=True), target.config, "some/target", tmp_path / "carrying")
    with pytest.raises(UserError, match=r"multiplies its embeddings by 8, .* train --method ctc"):
        export(drafter, Gemma3TextConfig(vocab_size=97, hidden_size=64), "some/target", tmp_path / "scaled")
    assert not (tmp_path / "carrying").exists()
    assert not (tmp_path / "scaled").exists()
