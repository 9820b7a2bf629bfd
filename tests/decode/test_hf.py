from pathlib import Path

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    LlamaForCausalLM,
    LogitsProcessor,
    SynthIDTextWatermarkingConfig,
    T5Config,
    T5ForConditionalGeneration,
    TextStreamer,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from ctc_drafter.decode.hf import speculate
from ctc_drafter.drafters.base import NoDrafter
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.types import UserError
from helpers import ScriptedDrafter, tiny_config, tiny_drafter, tiny_target
from tiny_models import tiny_tokenizer

PROMPTS = [[3, 1, 4, 1, 5, 9], [2, 7]]


class Counter(LogitsProcessor):
    calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores


class FirstRowOnly(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores[1:] = 0.0
        return scores


def padded():
    ids = torch.tensor([PROMPTS[0], [0] * 4 + PROMPTS[1]])
    return {"input_ids": ids, "attention_mask": torch.tensor([[1] * 6, [0] * 4 + [1] * 2])}


def model_and_drafter():
    target = tiny_target()
    return target.model, tiny_drafter(target)


@pytest.mark.parametrize("batch", [1, 2])
def test_generate_returns_what_it_always_returned(batch):
    model, drafter = model_and_drafter()
    inputs = {key: value[:batch] for key, value in padded().items()}
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, custom_generate=speculate(drafter)), plain)
    eos = int(plain[0, 12])
    plain = model.generate(**inputs, **options, eos_token_id=eos)
    assert torch.equal(model.generate(**inputs, **options, eos_token_id=eos, custom_generate=speculate(drafter)), plain)


def test_without_a_pad_rows_end_in_the_first_end_token():
    model, drafter = model_and_drafter()
    plain = model.generate(**padded(), max_new_tokens=20, do_sample=False, pad_token_id=0)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": [int(plain[0, 12]), 0]}
    expected = model.generate(**padded(), **options)
    assert torch.equal(model.generate(**padded(), **options, custom_generate=speculate(drafter)), expected)
    assert expected[0, -1] == plain[0, 12] > 0


def test_a_dictionary_when_asked_for():
    model, drafter = model_and_drafter()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    plain = model.generate(**padded(), **options)
    result = model.generate(**padded(), **options, custom_generate=speculate(drafter))
    assert type(result) is type(plain)
    assert torch.equal(result.sequences, plain.sequences)


def test_streams():
    model, drafter = model_and_drafter()
    got: list[int] = []
    decode = speculate(drafter, on_tokens=lambda _row, tokens: got.extend(tokens))
    ids = torch.tensor(PROMPTS[:1])
    result = model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0, custom_generate=decode)
    assert result[0, ids.shape[1] :].tolist() == got


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "beams"),
        ({"use_cache": False}, "use_cache"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"cache_implementation": "offloaded"}, "cache_implementation"),
        ({"attention_mask": torch.tensor([[1] * 6, [1] * 5 + [0]])}, "row 1 is padded on the right"),
        ({"attention_mask": torch.tensor([[0] * 6, [1] * 6])}, "row 0 is all zeros"),
        ({"attention_mask": torch.full((2, 6), 2)}, "0 and 1"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive_search"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"encoder_repetition_penalty": 1.5}, "encoder_repetition_penalty"),
        ({"watermarking_config": SynthIDTextWatermarkingConfig(3, [1, 2, 3])}, "watermarking_config"),
        ({"seeds": [1, 2]}, "do_sample=True"),
        ({"do_sample": True, "seeds": [1]}, "1 seeds for 2 rows"),
        ({"do_sample": True, "num_return_sequences": 2, "seeds": [1, 2]}, "2 seeds for 4 rows"),
        ({"position_ids": torch.arange(6).expand(2, -1) + 1}, "position_ids"),
        ({"output_router_logits": True}, "output_router_logits"),
        ({"logits_processor": [Counter()]}, "Counter keeps a state"),
        ({"logits_processor": [FirstRowOnly()]}, "FirstRowOnly keeps a state"),
    ],
    ids=lambda value: next(reversed(value)) if isinstance(value, dict) else None,
)
def test_what_it_cannot_honour_is_refused(options, message):
    model, drafter = model_and_drafter()
    options = padded() | {"max_new_tokens": 4, "pad_token_id": 0} | options
    with pytest.raises(UserError, match=message) as caught:
        model.generate(**options, custom_generate=speculate(drafter))
    assert "\n" not in str(caught.value)


def test_a_cache_in_use_is_refused():
    model, drafter = model_and_drafter()
    cache, ids = DynamicCache(), torch.tensor(PROMPTS[:1])
    model(ids[:, :-1], past_key_values=cache)
    with pytest.raises(UserError, match="past_key_values"):
        model.generate(ids, past_key_values=cache, max_new_tokens=2, custom_generate=speculate(drafter))


@pytest.mark.parametrize("more", [{}, {"input_ids": torch.tensor(PROMPTS[:1])}])
def test_embeddings_are_refused(more):
    model, drafter = model_and_drafter()
    states = model.get_input_embeddings()(torch.tensor(PROMPTS[:1]))
    with pytest.raises(UserError, match="embeddings; call generate with input_ids"):
        model.generate(inputs_embeds=states, max_new_tokens=2, custom_generate=speculate(drafter), **more)


def test_padding_within_a_row_is_no_text():
    model, drafter = model_and_drafter()
    inputs = {"input_ids": torch.tensor(PROMPTS[:1]), "attention_mask": torch.tensor([[0, 1, 1, 0, 1, 1]])}
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, custom_generate=speculate(drafter)), plain)


def test_padding_on_the_right_that_generate_finds_itself():
    model, drafter = model_and_drafter()
    with pytest.raises(UserError, match="padded on the right"):
        model.generate(torch.tensor([[5, 6, 0]]), max_new_tokens=2, pad_token_id=0, custom_generate=speculate(drafter))


def test_checkpoints_that_say_no_cache_are_decoded():
    model, drafter = model_and_drafter()
    model.generation_config.use_cache = model.config.use_cache = False
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(**padded(), **options)
    assert torch.equal(model.generate(**padded(), **options, custom_generate=speculate(drafter)), plain)


def test_configurations_loaded_without_a_cache_are_decoded(tmp_path):
    """Saved in config.json alone, as by training scripts."""
    model, drafter = model_and_drafter()
    model.config.use_cache = False
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(**padded(), **options)
    assert torch.equal(loaded.generate(**padded(), **options, custom_generate=speculate(drafter)), plain)


DRAFTERS = {
    "lookup": PromptLookup,
    "ctc": lambda: model_and_drafter()[1],
    "silent": NoDrafter,
    "scripted": lambda: ScriptedDrafter([[1]], 1),
}


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_drafter_by_itself_is_no_custom_generate(name):
    model, _ = model_and_drafter()
    with pytest.raises(UserError, match=r"custom_generate=speculate\(drafter\)"):
        model.generate(**padded(), max_new_tokens=2, pad_token_id=0, custom_generate=DRAFTERS[name]())


@pytest.mark.parametrize("thing", ["owner/name", Path("folder"), None, PromptLookup, speculate(PromptLookup()), 3])
def test_what_is_no_drafter_is_refused_at_once(thing):
    with pytest.raises(UserError, match="from_pretrained"):
        speculate(thing)


def encoder_decoders():
    small = {"vocab_size": 60, "d_model": 16, "max_position_embeddings": 64, "decoder_start_token_id": 2}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    speech = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 30}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "suppress_tokens": None}
    ids = {"input_ids": torch.tensor([[5, 6, 7]])}
    t5 = T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    yield "t5", T5ForConditionalGeneration(t5), ids
    yield "bart", BartForConditionalGeneration(BartConfig(**small, **layers, **heads)), ids
    whisper = WhisperForConditionalGeneration(WhisperConfig(**small, **layers, **heads, **speech, **tokens))
    yield "whisper", whisper, {"input_features": torch.zeros(1, 8, 20)}


@pytest.mark.parametrize("which", range(3), ids=["t5", "bart", "whisper"])
def test_encoder_decoder_models_are_called_that(which):
    name, model, inputs = list(encoder_decoders())[which]
    with pytest.raises(UserError, match=f"{name} is an encoder-decoder model"):
        model.generate(**inputs, max_new_tokens=2, custom_generate=speculate(PromptLookup()))


def test_a_streamer_shows_one_row():
    model, drafter = model_and_drafter()
    decode = speculate(drafter, streamer=TextStreamer(tiny_tokenizer()))
    with pytest.raises(UserError, match="one row"):
        model.generate(**padded(), max_new_tokens=2, pad_token_id=0, custom_generate=decode)


def test_another_targets_drafter_is_refused():
    _, drafter = model_and_drafter()
    other = LlamaForCausalLM(tiny_config(num_hidden_layers=2))
    with pytest.raises(UserError, match="layer count"):
        other.generate(torch.tensor([[1]]), max_new_tokens=2, pad_token_id=0, custom_generate=speculate(drafter))
