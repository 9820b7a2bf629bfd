"""What a `Speculator` is made of and used as: its model and drafter, adapters, pipelines, threads."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    StopStringCriteria,
    pipeline,
)

from ctc_drafter import PromptLookup, Speculator, Target, UserError, speculate
from ctc_drafter.decode.generate import generate as generate_ids
from ctc_drafter.drafters.base import placed
from helpers import tiny_drafter as drafter_of
from helpers import tiny_target
from test_speculator import IDS, MODEL, PLAIN, TOKENIZER, USUAL, Shown
from tiny_models import save_pair, tiny_drafter, tiny_llama


@pytest.fixture(scope="module")
def fast() -> Speculator:
    return Speculator(MODEL, tiny_drafter(MODEL), nodes=8, min_probability=0.0)


# The model and the drafter.


def test_drafters(tmp_path: Any) -> None:
    assert isinstance(Speculator(MODEL).drafter, PromptLookup)
    target, drafter = save_pair(tmp_path)
    for name in (drafter, str(drafter)):
        fast = Speculator(MODEL, name, nodes=8)
        assert type(fast.drafter).__name__ == "CTCDrafter"
        assert torch.equal(fast.generate(IDS, **USUAL), PLAIN)
    assert isinstance(Speculator(MODEL, "prompt_lookup").drafter, PromptLookup)
    with pytest.raises(UserError, match="holds no drafter but a model of type llama"):
        Speculator(MODEL, target)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("a name",), "a str is no model; give a causal LM of transformers"),
        ((torch.nn.Linear(2, 2),), "a Linear is no model"),
        ((MODEL, 3), "int is no drafter"),
        ((MODEL, PromptLookup), "PromptLookup is no drafter; give one that is loaded"),
        ((MODEL, drafter_of(tiny_target())), "made for a target with vocabulary 97, this one has 280"),
    ],
    ids=["str", "Linear", "int", "class", "another target"],
)
def test_wrong_pairs_are_refused_at_once(given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Speculator(*given)


def test_wrong_options_are_refused_at_once() -> None:
    with pytest.raises(UserError, match="nodes is 0"):
        Speculator(MODEL, nodes=0)
    with pytest.raises(TypeError, match="depth"):
        Speculator(MODEL, depth=3)  # type: ignore[call-arg]


def test_a_target_serves_as_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is: compiled, or with a cache of its own kind, and without another trial."""
    target, used = Target.wrap(MODEL, "static"), []
    new_cache = Target.new_cache

    def seen(self: Target, slots: int = 0) -> Any:
        used.append(self)
        return new_cache(self, slots)

    monkeypatch.setattr(Target, "new_cache", seen)
    assert torch.equal(Speculator(target).generate(IDS, **USUAL), PLAIN)
    assert [each is target for each in used] == [True]


def test_the_drafter_is_taken_to_the_models_dtype_and_stays_as_it_is() -> None:
    half = tiny_llama().to(torch.bfloat16)
    drafter = tiny_drafter(MODEL)
    drafter.prepared(MODEL.get_input_embeddings(), MODEL.get_output_embeddings())
    before = {name: tensor.clone() for name, tensor in drafter.state_dict().items()}
    expected = half.generate(IDS, **USUAL)
    for found in (
        Speculator(half, drafter).generate(IDS, **USUAL),
        half.generate(IDS, **USUAL, custom_generate=speculate(drafter)),
    ):
        assert found.shape == expected.shape
        assert {weight.dtype for weight in drafter.parameters()} == {torch.float32}
        assert all(torch.equal(tensor, before[name]) for name, tensor in drafter.state_dict().items())


def test_a_copy_leaves_the_other_target_behind() -> None:
    drafter = tiny_drafter(MODEL)
    drafter.prepared(MODEL.get_input_embeddings(), MODEL.get_output_embeddings())
    moved = placed(drafter, torch.device("meta"), torch.bfloat16)  # offloaded models say meta: nothing goes there
    assert moved is not drafter
    assert {weight.device.type for weight in moved.parameters()} == {"cpu"}
    assert moved._prepared is None
    assert drafter._prepared is not None
    assert placed(drafter, torch.device("cpu"), torch.float32) is drafter
    assert placed(drafter, torch.device("meta"), torch.float32) is drafter
    lookup = PromptLookup()
    assert placed(lookup, torch.device("cpu"), torch.float32) is lookup


def test_a_drafter_that_learns_on_is_read_anew() -> None:
    half, drafter = tiny_llama().to(torch.bfloat16), tiny_drafter(MODEL)
    fast = Speculator(half, drafter)
    fast.generate(IDS, **USUAL)
    place = fast._decoder.place
    fast.generate(IDS, **USUAL)
    assert place.cache_info().misses == 1
    with torch.no_grad():
        next(drafter.parameters()).mul_(2)
    fast.generate(IDS, **USUAL)
    assert place.cache_info().misses == 2


class Adapted(torch.nn.Module):
    """As peft's `PeftModel` shows itself: not a `PreTrainedModel`, with the model inside."""

    def __init__(self, learnt_prompt: bool = False):
        super().__init__()
        self.inside = MODEL
        self.active_peft_config = SimpleNamespace(is_prompt_learning=learnt_prompt, peft_type="PREFIX_TUNING")

    def get_base_model(self) -> torch.nn.Module:
        return self.inside


def test_adapters_are_unwrapped(tmp_path: Any) -> None:
    adapted = Adapted()
    assert Target.wrap(adapted).model is MODEL
    assert torch.equal(Speculator(adapted, nodes=8).generate(IDS, **USUAL), PLAIN)
    _, drafter = save_pair(tmp_path)
    assert torch.equal(Speculator(adapted, drafter).generate(IDS, **USUAL), PLAIN)
    with pytest.raises(UserError, match="prefix tuning puts vectors before the text"):
        Speculator(Adapted(learnt_prompt=True))


# One object, used like the model.


def test_what_is_asked_of_it_is_asked_of_the_model(fast: Speculator) -> None:
    assert fast.config is MODEL.config
    assert fast.generation_config is MODEL.generation_config
    assert fast.device == MODEL.device
    assert fast.can_generate()
    assert torch.equal(fast(IDS).logits, MODEL(IDS).logits)
    assert fast.get_output_embeddings() is MODEL.get_output_embeddings()
    for same in (fast.to("cpu"), fast.eval(), fast.float(), fast.requires_grad_(True)):
        assert same is fast, "not the model, which would draft nothing"
    assert isinstance(fast, Speculator)
    assert repr(fast) == "Speculator(LlamaForCausalLM, CTCDrafter)"
    with pytest.raises(UserError, match=r"set generation_config on its model: \.model\.generation_config = "):
        fast.generation_config = GenerationConfig()
    with pytest.raises(AttributeError, match="no attribute 'generat'"):
        fast.generat  # noqa: B018


def test_stats_are_those_of_the_last_call() -> None:
    drafter = tiny_drafter(MODEL)
    fast = Speculator(MODEL, drafter, nodes=8, min_probability=0.0)
    assert (fast.stats.tokens, fast.stats.tokens_per_step) == (0, 0.0)
    fast.generate(IDS, **USUAL)
    expected = generate_ids(
        Target.wrap(MODEL), drafter, IDS.tolist(), max_new_tokens=24, eos=(), nodes=8, min_probability=0.0
    ).stats
    found = fast.stats
    assert (found.tokens, found.steps, found.accept_histogram) == (24, expected.steps, expected.accept_histogram)
    assert found.tokens_per_step == 23 / expected.steps  # the prefill wrote the first
    assert found.seconds > found.prefill_seconds > 0
    fast.generate(torch.cat([IDS, IDS]), **USUAL | {"max_new_tokens": 5})
    assert fast.stats.tokens == 10
    with pytest.raises(UserError, match="beams"):
        fast.generate(IDS, **USUAL, num_beams=2)
    assert fast.stats.tokens == 10


def test_rows_written_on_until_all_have_ended_count_once() -> None:
    """Without an end token rows that stop are not filled up: `generate` goes on, and ours decodes them again."""
    rows = torch.tensor([[5, 9, 30, 31], [7, 8, 9, 7]])
    answers = MODEL.generate(rows, **USUAL)
    stop = StopStringCriteria(TOKENIZER, [TOKENIZER.decode(answers[0, 8:10])])
    fast = Speculator(MODEL)
    expected = MODEL.generate(rows, **USUAL, stopping_criteria=[stop])
    found = fast.generate(rows, **USUAL, stopping_criteria=[stop])
    assert torch.equal(found, expected)
    assert fast.stats.tokens == found[:, 4:].numel()


# Pipelines and threads.

CHAT = [{"role": "user", "content": "the cat sat on the mat"}]


@pytest.mark.parametrize("text", ["the cat sat on the", CHAT, ["the cat", "the mat and the hat"]])
def test_a_pipeline_takes_it_for_the_model(text: Any, caplog: pytest.LogCaptureFixture) -> None:
    fast = Speculator(MODEL, tiny_drafter(MODEL), nodes=8)
    greedy = {"do_sample": False, "max_new_tokens": 12}
    plain = pipeline("text-generation", model=MODEL, tokenizer=TOKENIZER, device="cpu")
    with caplog.at_level(logging.WARNING, "transformers"):
        ours = pipeline("text-generation", model=fast, tokenizer=TOKENIZER, device="cpu")
    assert "not supported" not in caplog.text
    assert ours(text, **greedy) == plain(text, **greedy)
    assert 12 <= fast.stats.tokens <= 24
    assert "LlamaForCausalLM" in repr(ours)


def test_a_pipeline_streams_and_stops() -> None:
    fast, streamer = Speculator(MODEL), Shown()
    ours = pipeline("text-generation", model=fast, tokenizer=TOKENIZER, device="cpu")
    [found] = ours("the cat sat on the", do_sample=False, max_new_tokens=12, streamer=streamer)
    assert streamer.text == found["generated_text"]
    assert streamer.ends == 1


def test_four_threads_with_stats_of_their_own() -> None:
    fast = Speculator(MODEL, tiny_drafter(MODEL), nodes=8, min_probability=0.0)
    prompts = [IDS[:, : 3 + place] for place in range(4)]
    counts = [6, 9, 12, 15]
    expected = [
        MODEL.generate(row, **USUAL | {"max_new_tokens": count}) for row, count in zip(prompts, counts, strict=True)
    ]
    wrong: list[Any] = []
    barrier = threading.Barrier(4, timeout=60)

    def work(place: int) -> None:
        for _ in range(3):
            barrier.wait()
            found = fast.generate(prompts[place], **USUAL | {"max_new_tokens": counts[place]})
            if not torch.equal(found, expected[place]) or fast.stats.tokens != counts[place]:
                wrong.append((place, found, fast.stats))

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert fast.stats.tokens in counts  # this thread made no call: the last one of any
