"""Processors, sampling and stopping give what stock `generate` gives."""

import time

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TextStreamer,
    WatermarkingConfig,
)

import tiny_models
from ctc_drafter.decode.generate import generate, plain_generate
from ctc_drafter.decode.hf import speculate
from ctc_drafter.decode.processors import process
from ctc_drafter.decode.sampling import Sampled
from ctc_drafter.decode.sequence import SequenceState
from ctc_drafter.target.model import Target
from helpers import VOCABULARY, ScriptedDrafter, tiny_drafter, tiny_target

PROMPTS = [[3, 1, 4, 1, 5, 9], [2, 7]]
NEW = 20
TARGET = tiny_target()


class EvenAfterOdd(LogitsProcessor):
    """A grammar: an odd token is followed by an even one."""

    def __call__(self, input_ids, scores):
        odd_last = input_ids[:, -1] % 2 == 1
        scores[odd_last, 1::2] = float("-inf")
        return scores


class SumIsDivisible(StoppingCriteria):
    def __init__(self, divisor):
        self.divisor = divisor

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.sum(1) % self.divisor == 0


def padded(batch):
    ids = torch.tensor([PROMPTS[0], [0] * 4 + PROMPTS[1]])
    return {"input_ids": ids[:batch], "attention_mask": torch.tensor([[1] * 6, [0] * 4 + [1] * 2])[:batch]}


def both(batch, options):
    """Stock output, and ours with drafts that are right, then sometimes right: (stock, [ours])."""
    inputs, model = padded(batch), TARGET.model
    options = {"pad_token_id": 0, "do_sample": False} | options
    plain = model.generate(**inputs, **options)
    new = plain[:, inputs["input_ids"].shape[1] :].tolist()
    scripts = [prompt + tokens for prompt, tokens in zip(PROMPTS, new, strict=False)]
    drafters = [ScriptedDrafter(scripts, right) for right in (4, (0, 3, 1, 4))] + [tiny_drafter(TARGET)]
    return plain, [model.generate(**inputs, **options, custom_generate=speculate(d, nodes=12)) for d in drafters]


FREE = TARGET.model.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
EOS = [int(FREE[0, 14]), 96]

PROCESSORS = {
    "repetition_penalty": {"repetition_penalty": 1.8},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[int(FREE[0, 8])], FREE[0, 10:12].tolist()]},
    "sequence_bias": {"sequence_bias": [[FREE[0, 7:9].tolist(), -9.0], [[5], 2.0]]},
    "forced_eos_token_id": {"forced_eos_token_id": 4},
    "min_new_tokens": {"min_new_tokens": 12, "eos_token_id": EOS},
    "min_length": {"min_length": 17, "eos_token_id": EOS},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (1, 3.0), "eos_token_id": EOS},
    "suppress_tokens": {"suppress_tokens": FREE[0, 7:9].tolist()},
    "begin_suppress_tokens": {"begin_suppress_tokens": [int(FREE[0, 6])]},
    "prefix_allowed_tokens_fn": {
        "prefix_allowed_tokens_fn": lambda row, text: list(range(row + len(text) % 3, VOCABULARY, 3))
    },
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=4.0)},
    "own grammar": {"logits_processor": LogitsProcessorList([EvenAfterOdd()])},
    "several": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 9, "eos_token_id": EOS},
}


# A batch of two has the row alone in it, beside one with padding.
BATCHES = [pytest.param(1, marks=pytest.mark.slow), 2]


@pytest.mark.sparing(6)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("options", PROCESSORS.values(), ids=PROCESSORS)
def test_greedy_with_processors(options, batch):
    plain, ours = both(batch, {"max_new_tokens": NEW} | options)
    without = {key: value for key, value in options.items() if key == "eos_token_id"}
    free = TARGET.model.generate(**padded(batch), max_new_tokens=NEW, do_sample=False, pad_token_id=0, **without)
    assert not torch.equal(plain, free), "the setting does nothing here"
    assert all(torch.equal(plain, result) for result in ours)


WARPERS = {
    "temperature": {"temperature": 0.6, "top_k": 0},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.7, "top_k": 0},
    "min_p": {"min_p": 0.1, "top_k": 0},
    "typical_p": {"typical_p": 0.8, "top_k": 0},
    "cutoffs": {"epsilon_cutoff": 0.01, "eta_cutoff": 0.01, "top_k": 0},
    "several": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("options", WARPERS.values(), ids=WARPERS)
def test_the_processed_scores_are_those_of_generate(options):
    """Rows at different places of their text, against the scores that `generate` reports step by step."""
    caught = []

    def catch(model, input_ids, logits_processor, **_rest):
        caught.append(logits_processor)
        return input_ids

    options = {"do_sample": True, "max_new_tokens": 6, "pad_token_id": 0} | options
    ids = torch.tensor([PROMPTS[0]])
    TARGET.model.generate(ids, **options, custom_generate=catch)
    kept = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    stock = TARGET.model.generate(ids, **options, **kept)
    new = stock.sequences[0, 6:].tolist()
    rows = [SequenceState(0, PROMPTS[0], 6, tokens=new[:step]) for step in range(6)]
    ours = process(caught[0], torch.cat(stock.logits), rows)
    torch.testing.assert_close(ours, torch.cat(stock.scores))
    assert not torch.equal(ours, torch.cat(stock.logits))


def test_sampling_is_repeatable_and_every_sequence_has_its_seed():
    model, drafter = TARGET.model, tiny_drafter(TARGET)
    options = {"max_new_tokens": NEW, "do_sample": True, "temperature": 0.8, "top_p": 0.9, "pad_token_id": 0}
    several = {**padded(2), **options, "num_return_sequences": 3, "custom_generate": speculate(drafter)}
    torch.manual_seed(1)
    first = model.generate(**several)
    torch.manual_seed(1)
    assert torch.equal(model.generate(**several), first)
    assert not torch.equal(model.generate(**several), first)
    assert len({tuple(row) for row in first.tolist()}) == 6

    seeds = [5, 6, 7, 8, 9, 10]
    together = model.generate(**several, seeds=seeds)
    for place, seed in enumerate(seeds):
        inputs = {key: value[place // 3 :][:1] for key, value in padded(2).items()}
        assert torch.equal(model.generate(**inputs, **options, seeds=[seed], custom_generate=speculate(drafter))[0],
                           together[place])  # fmt: skip


STOPPING = {
    "eos list": {"eos_token_id": EOS},
    "max_length": {"max_length": 13, "max_new_tokens": None},
    "own criterion": {"stopping_criteria": [SumIsDivisible(5)], "eos_token_id": 96},
    "no time": {"stopping_criteria": [MaxTimeCriteria(1.0, time.time() - 9)], "eos_token_id": 96},
    "time": {"max_time": 1000.0},
    "all": {"stopping_criteria": [SumIsDivisible(7), SumIsDivisible(11)], "eos_token_id": EOS, "max_time": 1000.0},
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("options", STOPPING.values(), ids=STOPPING)
def test_stops_where_generate_stops(options, batch):
    plain, ours = both(batch, {"max_new_tokens": NEW} | options)
    assert (plain.shape[1] < 6 + NEW) or (plain[:, -1] == 0).any() or options == STOPPING["time"]
    assert all(torch.equal(plain, result) for result in ours)


def test_stop_strings_need_a_tokenizer():
    options = {"max_new_tokens": 4, "pad_token_id": 0, "stop_strings": ["a"]}
    with pytest.raises(ValueError, match="tokenizer"):
        TARGET.model.generate(**padded(1), **options, custom_generate=speculate(tiny_drafter(TARGET)))


MODEL, TOKENIZER = tiny_models.tiny_llama(), tiny_models.tiny_tokenizer()


STOPS = given(
    prompt=st.lists(st.integers(5, 279), min_size=1, max_size=6),
    seed=st.integers(0, 2**63 - 1),
    begin=st.integers(0, NEW - 1),
    size=st.integers(1, 3),
    right=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    nodes=st.sampled_from([1, 4, 12]),
)


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@STOPS
def test_stop_strings_cut_after_the_first_token_that_completes_one(prompt, seed, begin, size, right, nodes):
    check_stop_strings(prompt, seed, begin, size, right, nodes)


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@STOPS
def test_many_stop_strings(prompt, seed, begin, size, right, nodes):
    check_stop_strings(prompt, seed, begin, size, right, nodes)


def check_stop_strings(prompt, seed, begin, size, right, nodes):
    target = Target(MODEL)
    sampled = {"sampler": Sampled([seed]), "max_new_tokens": NEW, "eos": ()}
    full = plain_generate(target, [prompt], **sampled).tokens[0]
    stop = TOKENIZER.decode(full[begin : begin + size])
    assume(stop)
    stopping = [StopStringCriteria(TOKENIZER, [stop])]
    # The oracle asks the criterion about longer and longer beginnings of the whole text.
    texts = [torch.tensor([prompt + full[: n + 1]]) for n in range(NEW)]
    end = next((n + 1 for n, text in enumerate(texts) if stopping[0](text, None)[0]), NEW)
    shown: list[int] = []
    plain = plain_generate(target, [prompt], **sampled, criteria=StoppingCriteriaList(stopping)).tokens
    drafter = ScriptedDrafter([prompt + full], right)
    ours = generate(
        target, drafter, [prompt], **sampled, nodes=nodes, criteria=StoppingCriteriaList(stopping),
        on_tokens=lambda _row, tokens: shown.extend(tokens),
    )  # fmt: skip
    assert plain == ours.tokens == [full[:end]] == [shown]


def test_a_streamer_shows_what_generate_shows(capsys):
    ids = torch.tensor([[10, 200, 31]])
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
    for skip in (True, False):
        MODEL.generate(ids, **options, streamer=TextStreamer(TOKENIZER, skip_prompt=skip))
        plain = capsys.readouterr().out
        decode = speculate(tiny_models.tiny_drafter(MODEL), streamer=TextStreamer(TOKENIZER, skip_prompt=skip))
        MODEL.generate(ids, **options, custom_generate=decode)
        assert capsys.readouterr().out == plain != ""
