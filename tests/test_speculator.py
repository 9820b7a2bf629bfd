"""`Speculator.generate` against the model's own `generate`: output, streamers, stop strings, refusals."""

from __future__ import annotations

import copy
import inspect
import threading
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TextIteratorStreamer,
    TextStreamer,
)

from ctc_drafter import PromptLookup, Speculator, UserError, speculate
from ctc_drafter.decode.generate_settings import SPECULATOR, Status
from tiny_models import tiny_drafter, tiny_llama, tiny_tokenizer

MODEL = tiny_llama()
TOKENIZER = tiny_tokenizer()
IDS = torch.tensor([[5, 9, 30, 31, 5, 9, 30]])
USUAL: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
PLAIN = MODEL.generate(IDS, **USUAL)


class Shown(TextStreamer):
    """Keeps what it is told, as ids and as text."""

    def __init__(self) -> None:
        super().__init__(TOKENIZER)
        self.ids: list[int] = []
        self.text, self.ends = "", 0

    def put(self, value: torch.Tensor) -> None:
        self.ids += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self.ends += stream_end


@pytest.fixture(scope="module")
def fast() -> Speculator:
    return Speculator(MODEL, tiny_drafter(MODEL), nodes=8, min_probability=0.0)


def test_arguments_come_in_the_order_of_generate() -> None:
    theirs = [name for name in inspect.signature(GenerationMixin.generate).parameters if name != "kwargs"]
    ours = [name for name, each in inspect.signature(Speculator.generate).parameters.items() if each.kind == 1]
    assert ours == theirs
    fast = Speculator(MODEL)
    config = GenerationConfig(**USUAL)
    assert torch.equal(fast.generate(IDS, config), PLAIN)
    assert torch.equal(fast.generate(inputs=IDS, generation_config=config), PLAIN)
    assert torch.equal(fast.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **USUAL), PLAIN)


@pytest.mark.parametrize(
    "options",
    [
        {"logits_processor": LogitsProcessorList([lambda _ids, scores: scores.roll(1, -1)])},
        {"prefix_allowed_tokens_fn": lambda _row, text: [len(text) % 9, 17]},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"eos_token_id": int(PLAIN[0, 15])},
        {"input_ids": torch.tensor([[0, 0, 5, 9, 30], [7, 8, 9, 7, 8]]), "num_return_sequences": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_output_is_that_of_generate(fast: Speculator, options: dict[str, Any]) -> None:
    given = {"input_ids": IDS} | USUAL | options
    assert torch.equal(fast.generate(**given), MODEL.generate(**given))


def test_a_dictionary_with_scores(fast: Speculator) -> None:
    more = {"return_dict_in_generate": True, "output_scores": True}
    expected, found = MODEL.generate(IDS, **USUAL, **more), fast.generate(IDS, **USUAL, **more)
    assert type(found) is type(expected)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(expected.scores), atol=1e-4, rtol=1e-4)


def test_sampling_repeats_by_seed(fast: Speculator) -> None:
    given = USUAL | {"do_sample": True, "temperature": 1.5}
    first, again = (fast.generate(IDS, **given, seeds=[3]) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(first, MODEL.generate(IDS, **given, seeds=[3], custom_generate=speculate(PromptLookup())))
    assert not torch.equal(first, fast.generate(IDS, **given, seeds=[4]))


def test_a_streamer_is_told_what_generate_tells_it(fast: Speculator) -> None:
    stock, ours = Shown(), Shown()
    MODEL.generate(IDS, **USUAL, streamer=stock)
    found = fast.generate(IDS, **USUAL, streamer=ours)
    assert ours.ids == stock.ids == found[0].tolist()
    assert (ours.text, ours.ends) == (stock.text, 1)


def test_a_reader_in_another_thread_does_not_wait_for_ever(fast: Speculator) -> None:
    streamer = TextIteratorStreamer(TOKENIZER, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=fast.generate, args=(IDS,), kwargs=USUAL | {"streamer": streamer})
    thread.start()
    assert "".join(streamer) == TOKENIZER.decode(PLAIN[0, IDS.shape[1] :])
    thread.join()
    assert fast.stats.tokens == 24


def test_each_step_is_told(fast: Speculator) -> None:
    told: list[int] = []
    fast.generate(IDS, **USUAL, on_tokens=lambda _row, tokens: told.extend(tokens))
    assert told == PLAIN[0, IDS.shape[1] :].tolist()


# Stop strings.


def stop_text() -> str:
    """The first letter that the answer does not begin with."""
    texts = [TOKENIZER.decode(token) for token in PLAIN[0, IDS.shape[1] :]]
    return next(text for text in texts[2:] if text.isascii() and text.isalnum() and text not in "".join(texts[:2]))


@pytest.mark.parametrize("place", ["argument", "config", "both", "saved", "saved, with a config"])
def test_stop_strings(place: str) -> None:
    model = tiny_llama()
    strings, given = [stop_text()], dict(USUAL)
    config = GenerationConfig(**USUAL)
    if place.startswith("saved"):
        model.generation_config.stop_strings = strings
    if place == "config":
        config.stop_strings = strings
    if place == "both":
        config.stop_strings = ["never in the text"]
    if place in ("argument", "both"):
        given["stop_strings"] = strings
    if place in ("config", "saved, with a config"):
        given = {"generation_config": config}
    if place == "both":
        given = {"generation_config": config, "stop_strings": strings}
    before = copy.deepcopy((config, model.generation_config))
    expected = model.generate(IDS, **given, tokenizer=TOKENIZER)
    found = Speculator(model, nodes=8).generate(IDS, **given, tokenizer=TOKENIZER)
    assert torch.equal(found, expected)
    assert IDS.shape[1] < found.shape[1] < PLAIN.shape[1]
    assert (config, model.generation_config) == before


def test_stop_strings_beside_criteria_and_without() -> None:
    fast = Speculator(MODEL)
    given = {"stop_strings": stop_text(), "tokenizer": TOKENIZER}
    for late in ([MaxLengthCriteria(9)], [MaxLengthCriteria(99)]):
        found = fast.generate(IDS, **USUAL, **given, stopping_criteria=late)
        assert torch.equal(found, MODEL.generate(IDS, **USUAL, **given, stopping_criteria=StoppingCriteriaList(late)))
        assert found.shape[1] < PLAIN.shape[1]
    with pytest.raises(UserError, match="stop_strings and a StopStringCriteria both say where to stop"):
        fast.generate(IDS, **USUAL, **given, stopping_criteria=[StopStringCriteria(TOKENIZER, ["b"])])
    config = GenerationConfig(**USUAL, stop_strings=[stop_text()])
    assert torch.equal(fast.generate(IDS, config, stop_strings=None), PLAIN)
    assert torch.equal(fast.generate(IDS, **USUAL, tokenizer=TOKENIZER), PLAIN)
    with pytest.raises(UserError, match="stop_strings needs the model's tokenizer; call generate with tokenizer="):
        fast.generate(IDS, **USUAL, stop_strings=["a"])


# What cannot be honoured.

WRONG = {
    "assistant_model": MODEL,
    "assistant_tokenizer": TOKENIZER,
    "custom_generate": speculate(PromptLookup()),
    "synced_gpus": True,
    "token_healing": True,
    "cache_implementation": "paged",
}


def test_every_row_of_the_table_is_tried() -> None:
    assert {each.name for each in SPECULATOR if each.status is Status.REFUSED} == WRONG.keys()
    honoured = {each.name for each in SPECULATOR if each.status is Status.HONOURED}
    assert honoured == {"streamer", "stop_strings", "tokenizer"}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused_is_refused_before_anything_is_computed(name: str) -> None:
    computed: list[int] = []
    hook = MODEL.register_forward_pre_hook(lambda *_: computed.append(1))
    setting = next(each for each in SPECULATOR if each.name == name)
    with pytest.raises(UserError) as caught:
        Speculator(MODEL).generate(IDS, **USUAL, **{name: WRONG[name]})
    hook.remove()
    assert not computed
    assert str(caught.value) == setting.note
    assert name in setting.note
    assert "\n" not in setting.note


def test_what_asks_for_nothing_is_let_through() -> None:
    nothing = dict.fromkeys(WRONG) | {"synced_gpus": False, "streamer": None, "stop_strings": None}
    assert torch.equal(Speculator(MODEL).generate(IDS, **USUAL, **nothing), PLAIN)


def test_token_healing_of_a_config_is_refused() -> None:
    with pytest.raises(UserError, match="token_healing"):
        Speculator(MODEL).generate(IDS, GenerationConfig(**USUAL, token_healing=True), tokenizer=TOKENIZER)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "beams"),
        ({"seeds": [1]}, "do_sample=True"),
        ({"streamer": Shown(), "input_ids": torch.ones(2, 3, dtype=torch.long)}, "a streamer shows one row, not 2"),
    ],
    ids=["num_beams", "seeds", "streamer"],
)
def test_what_speculate_refuses_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Speculator(MODEL).generate(**{"input_ids": IDS} | USUAL | options)
