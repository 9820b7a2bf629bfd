"""Every parameter of `generate` and field of `GenerationConfig` has a row in the table, and does what the row says."""

import inspect
from pathlib import Path

import pytest
import torch
from transformers import (
    CompileConfig,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxTimeCriteria,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

from benchmarks.generate_page import page
from ctc_drafter.decode.generate import plain_generate
from ctc_drafter.decode.generate_settings import FIELDS, INPUTS, OTHER_CACHES, PARAMETERS, Status
from ctc_drafter.decode.hf import speculate
from ctc_drafter.decode.sampling import Sampled
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.types import UserError
from helpers import tiny_target

TARGET = tiny_target()
MODEL = TARGET.model
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8]])
NEW = 10
OURS = speculate(PromptLookup(), nodes=6)
FREE = MODEL.generate(IDS, max_new_tokens=NEW, do_sample=False, pad_token_id=0)[0, 6:].tolist()
EOS = {"eos_token_id": [FREE[6], 96]}
DICT = {"return_dict_in_generate": True}

# Values that ask for something, one or several for each row that is honoured. Those with do_sample draw by seeds.
HONOURED = {
    "inputs": {},
    "generation_config": {
        "generation_config": GenerationConfig(max_new_tokens=7, pad_token_id=0, repetition_penalty=1.4)
    },
    "logits_processor": {"logits_processor": LogitsProcessorList([lambda ids, scores: scores.roll(1, -1)])},
    "stopping_criteria": {"stopping_criteria": [MaxTimeCriteria(1e-9)]},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda row, text: [row + 5, len(text) % 7]},
    "custom_generate": {},
    "kwargs": {"attention_mask": torch.ones_like(IDS), "min_length": 3},
    "seeds": {"do_sample": True},
    "max_length": {"max_length": 11, "max_new_tokens": None},
    "max_new_tokens": {"max_new_tokens": 3},
    "min_length": {"min_length": 14, **EOS},
    "min_new_tokens": {"min_new_tokens": 9, **EOS},
    "max_time": {"max_time": 1e-9},
    "do_sample": {"do_sample": True},
    "temperature": {"do_sample": True, "temperature": 0.5},
    "top_k": {"do_sample": True, "top_k": 5},
    "top_p": {"do_sample": True, "top_p": 0.6},
    "min_p": {"do_sample": True, "min_p": 0.1},
    "top_h": {"do_sample": True, "top_h": 0.4},
    "typical_p": {"do_sample": True, "typical_p": 0.7},
    "epsilon_cutoff": {"do_sample": True, "epsilon_cutoff": 0.02},
    "eta_cutoff": {"do_sample": True, "eta_cutoff": 0.02},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[FREE[2]], FREE[4:6]]},
    "renormalize_logits": {"renormalize_logits": True, "do_sample": True, "top_k": 5},
    "forced_bos_token_id": {"forced_bos_token_id": 7, "inputs": IDS[:, :1]},
    "forced_eos_token_id": {"forced_eos_token_id": 4},
    "remove_invalid_values": {"remove_invalid_values": True},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (1, 3.0), **EOS},
    "suppress_tokens": {"suppress_tokens": FREE[:3]},
    "begin_suppress_tokens": {"begin_suppress_tokens": FREE[:1]},
    "sequence_bias": {"sequence_bias": [[FREE[1:3], -9.0], [[5], 2.0]]},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=4.0)},
    "num_return_sequences": {"num_return_sequences": 3, "do_sample": True},
    "output_scores": {"output_scores": True, "suppress_tokens": FREE[:2], **DICT},
    "output_logits": {"output_logits": True, **DICT},
    "return_dict_in_generate": DICT,
    "pad_token_id": {"pad_token_id": 11, **EOS},
    "bos_token_id": {"bos_token_id": 5, "inputs": None},
    "eos_token_id": EOS,
}
REFUSED = {
    "num_beams": {"num_beams": 2},
    "use_mtp": {"use_mtp": True},
    "use_cache": {"use_cache": False},
    "cache_implementation": {"cache_implementation": "offloaded"},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 2},
    "token_healing": {"token_healing": True},
    "stop_strings": {"stop_strings": ["a"]},
    "guidance_scale": {"guidance_scale": 1.5},
    "output_attentions": {"output_attentions": True},
    "output_hidden_states": {"output_hidden_states": True, **DICT},
    "is_assistant": {"is_assistant": True},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
    "assistant_early_exit": {"assistant_early_exit": 1},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "dola_layers": {"dola_layers": "high"},
    "constraints": {"constraints": ["anything"]},
    "force_words_ids": {"force_words_ids": [[5]]},
}
IDLE = {
    "negative_prompt_ids": {"negative_prompt_ids": IDS},
    "negative_prompt_attention_mask": {"negative_prompt_attention_mask": torch.ones_like(IDS)},
    "trust_remote_code": {"trust_remote_code": True},
    "early_stopping": {"early_stopping": True},
    "cache_config": {"cache_config": {"backend": "quanto"}},
    "max_cache_len": {"max_cache_len": 64},
    "length_penalty": {"length_penalty": 2.0},
    "decoder_start_token_id": {"decoder_start_token_id": 5},
    "num_assistant_tokens": {"num_assistant_tokens": 5},
    "num_assistant_tokens_schedule": {"num_assistant_tokens_schedule": "heuristic"},
    "assistant_confidence_threshold": {"assistant_confidence_threshold": 0.9},
    "max_matching_ngram_size": {"max_matching_ngram_size": 3},
    "assistant_lookbehind": {"assistant_lookbehind": 3},
    "target_lookbehind": {"target_lookbehind": 3},
    "assistant_ensemble_weight": {"assistant_ensemble_weight": 0.5},
    "speculation_type": {"speculation_type": "dflash"},
    "compile_config": {"compile_config": CompileConfig()},
    "disable_compile": {"disable_compile": True},
    "continuous_batching_config": {"continuous_batching_config": {"page_size": 16}},
    "low_memory": {"low_memory": True},
    "prefill_chunk_size": {"prefill_chunk_size": 2},
    "diversity_penalty": {"diversity_penalty": 0.5},
    "num_beam_groups": {"num_beam_groups": 2},
    "_from_model_config": {"_from_model_config": True},
    "transformers_version": {"transformers_version": "1.0"},
    "cache_implementation": {"cache_implementation": "static"},
}
EVERYTHING = (*PARAMETERS, *FIELDS)


def names(*wanted: Status) -> list[str]:
    return [setting.name for setting in EVERYTHING if setting.status in wanted]


def arguments(options):
    """Positional prompt and keyword arguments of a call of `generate`."""
    usual = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    if "generation_config" in options:
        usual = {}
    options = usual | options
    return options.pop("inputs", IDS), options


def both(options):
    """Stock's answer, or that of plain sampled decoding, and ours."""
    inputs, options = arguments(options)
    if not options.get("do_sample"):
        return MODEL.generate(inputs, **options), MODEL.generate(inputs, **options, custom_generate=OURS)
    seeds = list(range(20, 20 + len(inputs) * options.get("num_return_sequences", 1)))
    seen = {}

    def plain(model, input_ids, logits_processor, **_rest):
        seen["processors"] = logits_processor
        sampler = Sampled(seeds, logits_processor)
        answers = plain_generate(TARGET, input_ids.tolist(), max_new_tokens=NEW, sampler=sampler).tokens
        return torch.cat([input_ids, torch.tensor(answers)], 1)

    expected = MODEL.generate(inputs, **options, custom_generate=plain)
    return expected, MODEL.generate(inputs, **options, seeds=seeds, custom_generate=OURS)


def test_every_parameter_and_field_has_a_row():
    parameters = set(inspect.signature(GenerationMixin.generate).parameters) - {"self"}
    popped = {"tokenizer", "assistant_tokenizer", "trust_remote_code"}
    assert {setting.name for setting in PARAMETERS} == parameters | popped | {"seeds"}
    assert {setting.name for setting in FIELDS} == set(vars(GenerationConfig()))
    assert len(EVERYTHING) == len({setting.name for setting in EVERYTHING})


def test_every_row_is_tried():
    assert set(names(Status.HONOURED)) == set(HONOURED)
    assert set(names(Status.REFUSED)) == set(REFUSED)
    assert set(names(Status.WITHOUT_EFFECT)) == set(IDLE) - {"cache_implementation"}


@pytest.mark.parametrize("name", HONOURED)
def test_what_is_honoured_gives_the_output_of_generate(name):
    expected, result = both(HONOURED[name])
    if isinstance(expected, torch.Tensor):
        assert torch.equal(result, expected)
        return
    assert torch.equal(result.sequences, expected.sequences)
    for kind in ("scores", "logits"):
        assert (getattr(result, kind) is None) == (getattr(expected, kind) is None)
        for mine, stock in zip(getattr(result, kind) or (), getattr(expected, kind) or (), strict=True):
            torch.testing.assert_close(mine, stock, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", sorted(HONOURED.keys() - {"inputs", "custom_generate", "kwargs", "remove_invalid_values"})
)
def test_what_is_honoured_was_asked_for_something(name):
    """The value tried is one that changes stock's output, or the processors that it hands over."""
    if name in ("seeds", "do_sample", "renormalize_logits") or HONOURED[name] in (EOS, {}):
        return
    inputs, options = arguments(HONOURED[name])
    caught = []

    def catch(model, input_ids, logits_processor, stopping_criteria, generation_config, **_rest):
        length = [each.max_length for each in stopping_criteria if hasattr(each, "max_length")]
        config = generation_config
        kept = (config.output_scores, config.output_logits, config.return_dict_in_generate)
        kinds = [str(getattr(each, "__dict__", each)) for each in (*logits_processor, *stopping_criteria)]
        caught.append((input_ids.tolist(), length, kinds, kept, generation_config.pad_token_id))

    usual = {key: options[key] for key in ("do_sample", *EOS) if key in options}
    MODEL.generate(inputs, **options, custom_generate=catch)
    MODEL.generate(IDS, max_new_tokens=NEW, pad_token_id=0, **usual, custom_generate=catch)
    assert caught[0] != caught[1]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_before_anything_is_computed(name):
    setting = next(each for each in EVERYTHING if each.name == name)
    inputs, options = arguments(REFUSED[name])
    computed = []
    hook = MODEL.register_forward_pre_hook(lambda *_: computed.append(1))
    with pytest.raises(ValueError if setting.by_transformers else UserError) as caught:
        MODEL.generate(inputs, **options, custom_generate=speculate(PromptLookup()))
    hook.remove()
    assert not computed
    if not setting.by_transformers:
        assert str(caught.value) == setting.note
        assert name in setting.note
        assert "\n" not in setting.note


@pytest.mark.filterwarnings("ignore:Passing ContinuousBatchingConfig:FutureWarning")
@pytest.mark.parametrize("name", IDLE)
def test_what_is_without_effect_changes_nothing(name):
    expected, result = both(IDLE[name])
    assert torch.equal(result, expected)
    assert torch.equal(expected, MODEL.generate(IDS, max_new_tokens=NEW, do_sample=False, pad_token_id=0))


@pytest.mark.parametrize("name", names(Status.UNSEEN))
def test_what_transformers_does_not_hand_over(name):
    """Where this fails, a callable can see the parameter: honour or refuse it."""
    seen = []

    def catch(
        model, input_ids, logits_processor, stopping_criteria, generation_config,
        streamer=None, assistant_model=None, synced_gpus=None, tokenizer=None, assistant_tokenizer=None, **rest,
    ):  # fmt: skip
        seen.append({**rest, "named": (streamer, assistant_model, synced_gpus, tokenizer, assistant_tokenizer)})
        return input_ids

    class Streamer:
        def put(self, tokens):
            return

    values = {"streamer": Streamer(), "assistant_model": MODEL, "synced_gpus": True}
    MODEL.generate(IDS, max_new_tokens=2, pad_token_id=0, custom_generate=catch, **{name: values.get(name, "any")})
    assert seen[0]["named"] == (None,) * 5
    assert name not in seen[0]


def test_every_cache_that_changes_output_or_memory_is_refused():
    usual = {"static", "dynamic", "sliding_window", "hybrid", "hybrid_chunked"}
    assert set(OTHER_CACHES) == set(ALL_CACHE_IMPLEMENTATIONS) - usual


def test_a_watermark_with_a_state_is_refused():
    options = {"watermarking_config": SynthIDTextWatermarkingConfig(3, [1, 2, 3])}
    with pytest.raises(UserError, match="watermarking_config"):
        MODEL.generate(IDS, max_new_tokens=2, pad_token_id=0, custom_generate=OURS, **options)


def test_the_inputs_of_the_table_are_looked_at():
    assert {setting.name for setting in INPUTS} >= {"input_ids", "attention_mask", "position_ids", "inputs_embeds"}


def test_the_page_is_that_of_the_table():
    written = (Path(__file__).parents[2] / "docs" / "generate.md").read_text(encoding="utf-8")
    assert written == page(), "python -m benchmarks.generate_page > docs/generate.md"
