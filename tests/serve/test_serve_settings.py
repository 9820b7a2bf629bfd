"""Penalties, biases and ends of answers: each is what stock processors make of plain decoding."""

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from ctc_drafter.chat import eos_ids
from ctc_drafter.cli.answer import Answerer, AnswerSettings
from ctc_drafter.decode.generate import plain_generate
from ctc_drafter.decode.prefill import prefill
from ctc_drafter.decode.sampling import Greedy, Sampled
from serve_helpers import NAME, running, text_of, tiny_service

NEW = 24


@pytest.fixture(scope="module")
def server():
    with running(tiny_service()) as at:
        yield at


@pytest.fixture(scope="module")
def prompt(server):
    return list(server.service.tokenizer("the cat sat").input_ids)


def ids_of(server, prompt, **options):
    options = {"max_tokens": NEW, "temperature": 0, **options}
    extra = {"return_token_ids": True} | options.pop("extra", {})
    reply = server.client().completions.create(model=NAME, prompt=prompt, extra_body=extra, **options)
    choice = reply.choices[0]
    assert choice.text == text_of(server.service, choice.token_ids)
    return choice.token_ids, choice.finish_reason


def plain(server, prompt, sampler, eos=None):
    service = server.service
    eos = eos_ids(service.target.model, service.tokenizer) if eos is None else eos
    return plain_generate(service.target, [prompt], max_new_tokens=NEW, eos=eos, sampler=sampler).tokens[0]


class OpenAIPenalties(LogitsProcessor):
    """OpenAI's formula, written out: mu[j] - c[j] * frequency - (c[j] > 0) * presence."""

    def __init__(self, start, presence, frequency):
        self.start, self.presence, self.frequency = start, presence, frequency

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for row, text in enumerate(input_ids[:, self.start :].tolist()):
            for token in set(text):
                scores[row, token] -= text.count(token) * self.frequency + self.presence
        return scores


def stock(name, prompt):
    eos = [1]
    return {
        "repetition_penalty": [RepetitionPenaltyLogitsProcessor(1.7)],
        "logit_bias": [SequenceBiasLogitsProcessor([[[270], 3.0], [[40], -100.0], [[9], 1.5]])],
        "min_tokens": [MinNewTokensLengthLogitsProcessor(len(prompt), 9, eos)],
        "penalties": [OpenAIPenalties(len(prompt), 0.5, 0.25)],
        "all": [
            SequenceBiasLogitsProcessor([[[270], 3.0]]),
            RepetitionPenaltyLogitsProcessor(1.2),
            OpenAIPenalties(len(prompt), 0.25, 0.0),
        ],
    }[name]


CASES = {
    "repetition_penalty": {"extra": {"repetition_penalty": 1.7}},
    "logit_bias": {"logit_bias": {"270": 3, "40": -100, "9": 1.5}},
    "min_tokens": {"extra": {"min_tokens": 9}},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.25},
    "all": {"logit_bias": {"270": 3}, "presence_penalty": 0.25, "extra": {"repetition_penalty": 1.2}},
}


@pytest.mark.sparing
@pytest.mark.parametrize("name", CASES)
def test_settings_are_stock_processors(server, prompt, name):
    greedy = plain(server, prompt, Greedy(LogitsProcessorList(stock(name, prompt))))
    assert ids_of(server, prompt, **CASES[name])[0] == greedy
    warmed = [*stock(name, prompt), TemperatureLogitsWarper(1.3)]
    sampled = plain(server, prompt, Sampled(5, LogitsProcessorList(warmed)))
    assert ids_of(server, prompt, **CASES[name], seed=5, temperature=1.3)[0] == sampled
    if name != "min_tokens":
        assert greedy != plain(server, prompt, Greedy(LogitsProcessorList())), "the case would show nothing"


def test_stock_generate_writes_the_same(server, prompt):
    """One whole check against transformers' own loop."""
    options = {"max_new_tokens": NEW, "do_sample": False, "repetition_penalty": 1.7, "pad_token_id": 1}
    text = server.service.target.model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :]
    assert ids_of(server, prompt, **CASES["repetition_penalty"])[0] == text.tolist()


@pytest.mark.slow
def test_min_p(server, prompt):
    stocks = LogitsProcessorList([TemperatureLogitsWarper(2.0), MinPLogitsWarper(0.5)])
    expected = plain(server, prompt, Sampled(3, stocks))
    assert ids_of(server, prompt, seed=3, temperature=2.0, extra={"min_p": 0.5})[0] == expected
    assert ids_of(server, prompt, seed=3, temperature=2.0)[0] != expected


def test_ends(server, prompt):
    """End tokens of the request, none, and none before so many."""
    free = plain(server, prompt, Greedy(LogitsProcessorList()), eos=())
    stop = next(token for token in free[3:] if token not in free[:3])
    at = free.index(stop)
    assert ids_of(server, prompt, extra={"stop_token_ids": [stop], "ignore_eos": True}) == (free[: at + 1], "stop")
    assert ids_of(server, prompt, extra={"ignore_eos": True}) == (free, "length")
    late = MinNewTokensLengthLogitsProcessor(len(prompt), at + 2, [stop])
    expected = plain(server, prompt, Greedy(LogitsProcessorList([late])), eos=[stop])
    extra = {"stop_token_ids": [stop], "ignore_eos": True, "min_tokens": at + 2}
    assert ids_of(server, prompt, extra=extra)[0] == expected
    assert expected[at] != stop


def test_the_models_end_token_is_ignored(server, prompt):
    """A bias makes it the likeliest one."""
    bias = {"logit_bias": {"1": 100}}
    assert ids_of(server, prompt, **bias) == ([1], "stop")
    assert ids_of(server, prompt, **bias, extra={"ignore_eos": True}) == ([1] * NEW, "length")
    tokens, _ = ids_of(server, prompt, **bias, extra={"min_tokens": 4})
    assert (len(tokens), tokens[-1], 1 in tokens[:-1]) == (5, 1, False)


def test_prompts_of_different_lengths(server):
    """Penalties count what each answer holds, not what its prompt does."""
    prompts = [list(server.service.tokenizer(text).input_ids) for text in ("the cat", "the cat sat on the mat and")]
    reply = server.client().completions.create(
        model=NAME,
        prompt=prompts,
        max_tokens=NEW,
        temperature=0,
        frequency_penalty=1.5,
        extra_body={"return_token_ids": True, "min_tokens": 3},
    )
    for prompt, choice in zip(prompts, reply.choices, strict=True):
        stocks = [OpenAIPenalties(len(prompt), 0, 1.5), MinNewTokensLengthLogitsProcessor(len(prompt), 3, [1])]
        assert choice.token_ids == plain(server, prompt, Greedy(LogitsProcessorList(stocks)))


def test_the_target_is_asked_no_more_often_than_plain(server, prompt):
    """The first logits are the prefill's: the penalty of an empty answer changes nothing."""
    first = prefill(server.service.target, [prompt]).logits[0].argmax().item()
    assert ids_of(server, prompt, frequency_penalty=2.0)[0][0] == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_bias": {"280": 1}}, "logit_bias: there is no token 280; the last one is 279"),
        ({"logit_bias": {"cat": 1}}, "logit_bias.cat"),
        ({"logit_bias": {"7": 101}}, "logit_bias.7: Input should be less than or equal to 100"),
        ({"extra": {"stop_token_ids": [-1]}}, "stop_token_ids: there is no token -1"),
        ({"frequency_penalty": 2.5}, "frequency_penalty: "),
        ({"extra": {"repetition_penalty": 0}}, "repetition_penalty: "),
        ({"extra": {"min_p": 1.5}}, "min_p: "),
        ({"extra": {"min_tokens": -1}}, "min_tokens: "),
    ],
    ids=str,
)
def test_refusals(server, prompt, options, message):
    import openai

    with pytest.raises(openai.BadRequestError, match=message):
        ids_of(server, prompt, **options)


def test_a_stop_string_may_be_a_special_token(server, prompt):
    """In the server as on the command line, and with text around it: the token decides, though it is not shown."""
    service = server.service
    settings = AnswerSettings(NEW, 1, 8, raw=True, temperature=1.5, stop=("<|user|>",))
    bias = {"logit_bias": {"2": 4}}  # else a random model rarely draws it
    stocks = LogitsProcessorList([SequenceBiasLogitsProcessor([[[2], 4.0]]), TemperatureLogitsWarper(1.5)])
    tried = ((seed, plain(server, prompt, Sampled(seed, stocks))) for seed in range(100))
    seed, free = next((seed, free) for seed, free in tried if 2 in free[3:] and 2 not in free[:3])
    before = free[: free.index(2)]
    reply = server.client().completions.create(
        model=NAME, prompt=prompt, max_tokens=NEW, seed=seed, temperature=1.5, stop="<|user|>", **bias
    )
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == (text_of(service, before), "stop")
    assert reply.usage.completion_tokens == len(before) + 1
    answerer = Answerer(service.target, None, service.tokenizer, settings)
    assert answerer.text(free) == text_of(service, before)
    criterion, text = answerer.criteria()[0], torch.tensor([prompt + before])
    assert not criterion(text, None)
    assert criterion(torch.cat([text, torch.tensor([[2]])], 1), None)


def test_defaults_are_the_models(prompt):
    """Its generation config's, unless a request says otherwise; a neutral value says so."""
    service = tiny_service()
    config = service.target.model.generation_config
    config.temperature, config.top_k, config.repetition_penalty = 0.7, 3, 1.4
    stocks = [RepetitionPenaltyLogitsProcessor(1.4), TemperatureLogitsWarper(0.7), TopKLogitsWarper(3)]
    with running(service) as at:

        def ask(**extra):
            reply = at.client().completions.create(
                model=NAME, prompt=prompt, max_tokens=NEW, seed=3, extra_body={"return_token_ids": True, **extra}
            )
            return reply.choices[0].token_ids

        def expected(*stocks):
            return plain(at, prompt, Sampled(3, LogitsProcessorList(stocks)))

        assert ask() == expected(*stocks)
        assert ask(temperature=1, repetition_penalty=1) == expected(stocks[2])
        for nothing in (0, -1):
            assert ask(top_k=nothing) == expected(*stocks[:2])
        assert ask(top_k=-1, temperature=1, repetition_penalty=1.0) == expected()
