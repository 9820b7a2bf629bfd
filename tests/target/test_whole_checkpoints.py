"""Checkpoints that lack some of their weights are refused by name, in one line; whole ones are not."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from benchmarks.families import family_model
from ctc_drafter.cli import main
from ctc_drafter.load import load_drafter, load_target
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError
from helpers import tiny_target
from tiny_models import save_pair, tiny_tokenizer

UNTIED = ("Llama", "Mistral, sliding", "Qwen2")


def saved(folder: Path, **overrides) -> Path:
    tiny_target(**overrides).model.save_pretrained(folder)
    return folder


def change(folder: Path, edit) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(edit(weights), folder / "model.safetensors", {"format": "pt"})


def configure(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def refused(folder: Path, *words: str) -> str:
    with pytest.raises(UserError) as error:
        Target.load(str(folder))
    message = str(error.value)
    assert "\n" not in message
    for word in (str(folder), *words):
        assert word in message
    return message


def without(*parts: str):
    return lambda weights: {name: tensor for name, tensor in weights.items() if not any(p in name for p in parts)}


def test_missing_layers_are_named(tmp_path):
    change(saved(tmp_path), without("layers.1.", "layers.2."))
    message = refused(tmp_path, "18 tensors are missing", "model.layers.1.")
    assert len(message) < 400


def test_a_single_missing_tensor(tmp_path):
    change(saved(tmp_path), without("layers.1.self_attn.o_proj"))
    refused(tmp_path, "model.layers.1.self_attn.o_proj.weight is missing")


def test_one_line_and_exit_2_on_the_command_line(tmp_path, capfd):
    change(saved(tmp_path), without("layers.2."))
    tiny_tokenizer().save_pretrained(tmp_path)
    capfd.readouterr()
    assert main(["generate", "--target", str(tmp_path), "--plain", "--raw", "--prompt", "a"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert "model.layers.2" in err


def test_a_file_of_something_else(tmp_path):
    change(saved(tmp_path), lambda weights: {"x": torch.zeros(1)})
    refused(tmp_path, "missing")


def test_more_layers_than_are_stored(tmp_path):
    configure(saved(tmp_path), num_hidden_layers=4, layer_types=None)
    refused(tmp_path, "9 tensors are missing", "model.layers.3.")


def test_weights_of_another_architecture(tmp_path):
    configure(saved(tmp_path), model_type="gpt2", architectures=["GPT2LMHeadModel"])
    refused(tmp_path, "missing")


def test_a_head_that_is_neither_stored_nor_tied(tmp_path):
    tiny_target(tie_word_embeddings=True).model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    Target.load(str(tmp_path))
    configure(tmp_path, tie_word_embeddings=False)
    refused(tmp_path, "lm_head.weight is missing")


@pytest.mark.parametrize("tied", [True, False])
def test_a_base_model_alone(tmp_path, tied):
    """Its tensors have no prefix; with a tied head they are all that is needed."""
    model = tiny_target(tie_word_embeddings=tied).model
    model.model.save_pretrained(tmp_path)
    configure(tmp_path, architectures=["LlamaForCausalLM"])
    if not tied:
        refused(tmp_path, "lm_head.weight is missing")
        return
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        torch.testing.assert_close(Target.load(str(tmp_path)).model(tokens).logits, model(tokens).logits)


def test_tied_weights_that_are_not_there_at_all(tmp_path):
    change(saved(tmp_path, tie_word_embeddings=True), without("embed_tokens"))
    refused(tmp_path, "embed_tokens")


def test_a_tied_weight_under_its_other_name(tmp_path):
    change(
        saved(tmp_path, tie_word_embeddings=True), lambda w: {"lm_head.weight": w.pop("model.embed_tokens.weight"), **w}
    )
    Target.load(str(tmp_path))


def test_tensors_of_another_shape(tmp_path):
    def wider(weights):
        return weights | {"model.norm.weight": torch.ones(80)}

    change(saved(tmp_path), wider)
    refused(tmp_path, "model.norm.weight", "(80,)", "(64,)")


def test_unexpected_tensors_are_named_in_one_line(tmp_path, caplog):
    change(saved(tmp_path), lambda weights: weights | {f"extra.{i}.weight": torch.zeros(2) for i in range(9)})
    with caplog.at_level(logging.WARNING, "ctc_drafter"):
        Target.load(str(tmp_path))
    (line,) = [each.getMessage() for each in caplog.records if each.name.startswith("ctc_drafter")]
    assert "9 tensors" in line
    assert "extra.0.weight" in line
    assert "extra.8.weight" not in line


def sharded(folder: Path) -> dict[str, str]:
    tiny_target().model.save_pretrained(folder, max_shard_size="100KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    return index


def test_whole_shards_load_and_a_missing_one_is_named(tmp_path):
    index = sharded(tmp_path)
    assert Target.load(str(tmp_path)).num_layers == 3
    last = max(index.values())
    (tmp_path / last).unlink()
    refused(tmp_path, last)


def test_an_index_that_leaves_a_shard_out(tmp_path):
    index = sharded(tmp_path)
    last = max(index.values())
    lost = [name for name, shard in index.items() if shard == last]
    file = tmp_path / "model.safetensors.index.json"
    whole = json.loads(file.read_text())
    whole["weight_map"] = {name: shard for name, shard in index.items() if shard != last}
    file.write_text(json.dumps(whole))
    (tmp_path / last).unlink()
    assert any(name in refused(tmp_path, "missing") for name in lost)


def test_an_index_that_names_tensors_which_its_shard_lacks(tmp_path):
    index = sharded(tmp_path)
    name, shard = next((name, shard) for name, shard in index.items() if "q_proj" in name)
    weights = load_file(tmp_path / shard)
    save_file({key: tensor for key, tensor in weights.items() if key != name}, tmp_path / shard, {"format": "pt"})
    refused(tmp_path, f"{name} is missing")


@pytest.mark.sparing(2)
@pytest.mark.parametrize(
    "family", ["Llama", "Gemma 3", "GPT-2", "OPT", "GPT-NeoX", "Falcon, rotary", "DeepSeek-V3", "GPT-OSS"]
)
def test_whole_checkpoints_raise_no_alarm(tmp_path, caplog, family):
    model = family_model(family)
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "ctc_drafter"):
        Target.load(str(tmp_path))
    assert caplog.records == []


def test_buffers_that_are_computed_raise_no_alarm(tmp_path, caplog):
    """Old checkpoints hold or lack what today's classes compute: rotary frequencies, causal masks."""
    change(
        saved(tmp_path),
        lambda weights: weights | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(3)},
    )
    with caplog.at_level(logging.WARNING, "ctc_drafter"):
        Target.load(str(tmp_path))
    assert caplog.records == []


class Extra(transformers.LlamaForCausalLM):
    """A class with a buffer that is saved, and a parameter that its checkpoints need not have."""

    config_class = transformers.LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("ramp", torch.arange(3.0))
        self.gauge = torch.nn.Parameter(torch.zeros(2))
        self.post_init()


@pytest.fixture
def extra(monkeypatch):
    class ExtraConfig(transformers.LlamaConfig):
        model_type = "llama_extra"

    monkeypatch.setattr(Extra, "config_class", ExtraConfig)
    transformers.AutoConfig.register("llama_extra", ExtraConfig)
    transformers.AutoModelForCausalLM.register(ExtraConfig, Extra)
    yield ExtraConfig
    transformers.models.auto.configuration_auto.CONFIG_MAPPING._extra_content.pop("llama_extra")
    transformers.AutoModelForCausalLM._model_mapping._extra_content.pop(ExtraConfig)


def test_what_a_class_allows_to_be_missing(tmp_path, extra, monkeypatch, caplog):
    model = Extra(extra(**tiny_target().config.to_diff_dict() | {"model_type": "llama_extra"}))
    model.save_pretrained(tmp_path)
    Target.load(str(tmp_path))
    change(tmp_path, without("gauge"))
    refused(tmp_path, "gauge is missing")
    monkeypatch.setattr(Extra, "_keys_to_ignore_on_load_missing", [r"gauge"])
    Target.load(str(tmp_path))
    change(tmp_path, without("ramp"))
    with caplog.at_level(logging.WARNING, "ctc_drafter"):
        Target.load(str(tmp_path))
    assert "ramp" in caplog.text


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp_quant"])
def test_quantised_targets_without_their_library(tmp_path, method):
    settings = {"quant_method": method, "bits": 4, "group_size": 128}
    settings |= {"load_in_4bit": True} if method == "bitsandbytes" else {}
    configure(saved(tmp_path), quantization_config=settings)
    refused(tmp_path)


@pytest.mark.sparing(3)
@pytest.mark.parametrize(
    "values",
    [
        {"num_attention_heads": 0},
        {"num_attention_heads": "four"},
        {"hidden_size": -1},
        {"hidden_size": None},
        {"hidden_size": 1.5},
        {"num_hidden_layers": "x"},
        {"vocab_size": [1]},
        {"num_key_value_heads": 0},
        {"hidden_act": "no-such"},
        {"hidden_act": 3},
        {"rms_norm_eps": "tiny"},
        {"rope_parameters": {"rope_type": "no-such"}},
        {"rope_parameters": 7},
        {"pad_token_id": 10**9},
        {"architectures": 3},
        {"layer_types": ["full_attention"]},
        {"dtype": "float7"},
        {"tie_word_embeddings": "perhaps"},
        {"num_hidden_layers": 0},
    ],
)
def test_absurd_configurations_are_one_line(tmp_path, values):
    configure(saved(tmp_path), **values)
    said = ""
    try:
        Target.load(str(tmp_path))
    except UserError as error:  # a few are taken, since nothing reads them
        said = str(error)
    assert "\n" not in said


def test_pickles_are_refused_without_torchs_advice(tmp_path):
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"x": Path("/")}, tmp_path / "pytorch_model.bin")
    assert "weights_only" not in refused(tmp_path)


@pytest.mark.slow
def test_drafters_without_some_tensors_are_refused(tmp_path):
    target, drafter = save_pair(tmp_path)
    found, tokenizer = load_target(str(target), "float32", "cpu")
    whole = load_file(drafter / "model.safetensors")
    load_drafter(str(drafter), found, tokenizer)
    for name, tensor in whole.items():
        save_file({k: t for k, t in whole.items() if k != name}, drafter / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=r"not a whole drafter.*missing") as error:
            load_drafter(str(drafter), found, tokenizer)
        assert name in str(error.value)
        other = torch.zeros(*(size + 1 for size in tensor.shape))
        save_file(whole | {name: other}, drafter / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError) as error:
            load_drafter(str(drafter), found, tokenizer)
        assert name in str(error.value)


def medusa(folder: Path, heads: int = 3, width: int = 64, vocabulary: int = 280) -> dict[str, torch.Tensor]:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"medusa_num_heads": heads, "medusa_num_layers": 1}))
    tensors = {}
    for head in range(heads):
        tensors |= {f"{head}.0.linear.weight": torch.zeros(width, width), f"{head}.0.linear.bias": torch.zeros(width)}
        tensors[f"{head}.1.weight"] = torch.zeros(vocabulary, width)
    save_file(tensors, folder / "medusa_lm_head.safetensors")
    return tensors


def test_published_drafters_without_some_tensors_are_refused(tmp_path):
    target, _ = save_pair(tmp_path)
    found, tokenizer = load_target(str(target), "float32", "cpu")
    tensors = medusa(tmp_path / "medusa")
    load_drafter(str(tmp_path / "medusa"), found, tokenizer)
    for name in ("1.0.linear.weight", "2.0.linear.bias", "1.1.weight"):
        kept = {key: tensor for key, tensor in tensors.items() if key != name}
        save_file(kept, tmp_path / "medusa" / "medusa_lm_head.safetensors")
        with pytest.raises(UserError, match="missing"):
            load_drafter(str(tmp_path / "medusa"), found, tokenizer)
