"""Prompts with pictures give what stock `generate` gives, whatever is drafted."""

import copy
from functools import wraps

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from ctc_drafter import Speculator, speculate
from ctc_drafter.decode.generate_inputs import refuse_inputs
from ctc_drafter.decode.pictures import Pictures
from ctc_drafter.decode.prefill import prefill
from ctc_drafter.decode.sampling import Sampled
from ctc_drafter.decode.sequence import SequenceState
from ctc_drafter.drafters.base import NoDrafter
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.target.compiled import compile_target
from ctc_drafter.target.exact import exact_target
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError
from helpers import ScriptedDrafter, tiny_drafter
from multimodal import MODELS, PICTURE, PLACEHOLDER, TEXT, build, prompts

NEW = 20
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
TRIED = ("Qwen2_5_VL", "Gemma3", "SmolVLM")
ROWS = {
    "padded": [[3, PICTURE, 1, PICTURE, 5, 9], [PICTURE, 7]],
    "one": [[3, 1, PICTURE, 5, 9]],
    "two pictures": [[PICTURE, 4, 1, PICTURE, 5]],
    "text beside": [[2, 4, 4, 8, 6, 1], [3, PICTURE, 7, 2]],
    "ends in a picture": [[3, 8, PICTURE]],
}
RIGHT = {"never": 0, "always": 4, "sometimes": (0, 3, 1, 4)}

MADE = {}


def model_of(name):
    """A copy of its own for each test."""
    if name not in MADE:
        MADE[name] = build(name)
    return copy.deepcopy(MADE[name])


def texts_of(output, inputs):
    """Rows of `generate` without their padding."""
    padding = (inputs["attention_mask"] == 0).sum(1).tolist()
    return [row[count:].tolist() for row, count in zip(output, padding, strict=True)]


@pytest.mark.sparing(3)
@pytest.mark.parametrize("name", TRIED)
@pytest.mark.parametrize("rows", ROWS)
def test_pictures_give_what_generate_gives(name, rows):
    model, inputs = model_of(name), prompts(name, ROWS[rows])
    plain = model.generate(**inputs, **GREEDY)
    drafters = [ScriptedDrafter(texts_of(plain, inputs), right) for right in RIGHT.values()]
    target = Target.wrap(model)
    for drafter in (*drafters, tiny_drafter(target)):
        assert torch.equal(Speculator(target, drafter, nodes=8).generate(**inputs, **GREEDY), plain)
    assert torch.equal(model.generate(**inputs, **GREEDY, custom_generate=speculate(drafters[2])), plain)
    others = model.generate(**prompts(name, ROWS[rows], seed=2), **GREEDY)
    assert not torch.equal(others, plain)  # pictures are seen


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS.keys() - {*TRIED, "PaliGemma"}))
@pytest.mark.parametrize("rows", ROWS)
def test_other_classes_give_what_generate_gives(name, rows):
    test_pictures_give_what_generate_gives(name, rows)


@pytest.mark.parametrize("name", TRIED)
def test_right_drafts_are_accepted(name):
    """Positions and masks of trees behind pictures are right, or nothing but the first token would be."""
    model, inputs = model_of(name), prompts(name, ROWS["one"])
    plain = model.generate(**inputs, **GREEDY)
    fast = Speculator(model, ScriptedDrafter(texts_of(plain, inputs), 4))
    assert torch.equal(fast.generate(**inputs, **GREEDY), plain)
    assert fast.stats.tokens_per_step > 4


class Drawn(LogitsProcessor):
    """Leaves the token that `Sampled` draws, so that stock greedy decoding writes a sampled text."""

    def __init__(self, seeds, given):
        self.sampler, self.given = Sampled(seeds), given

    def __call__(self, input_ids, scores):
        texts = input_ids[:, self.given :].tolist()
        rows = [SequenceState(index, [0], NEW, tokens=text) for index, text in enumerate(texts)]
        drawn = self.sampler.sample(scores, rows)
        return torch.full_like(scores, -1e9).scatter(1, drawn.unsqueeze(1), 0.0)


@pytest.mark.sparing
@pytest.mark.parametrize("name", TRIED)
def test_sampled_texts_are_those_of_their_seeds(name):
    model, inputs, seeds = model_of(name), prompts(name, ROWS["padded"]), [5, 6]
    processors = LogitsProcessorList([Drawn(seeds, inputs["input_ids"].shape[1])])
    expected = model.generate(**inputs, **GREEDY, logits_processor=processors)
    assert not torch.equal(expected, model.generate(**inputs, **GREEDY))
    options = {"max_new_tokens": NEW, "do_sample": True, "top_k": 0, "seeds": seeds}
    target = Target(model)
    for right in RIGHT.values():
        drafter = ScriptedDrafter(texts_of(expected, inputs), right)
        assert torch.equal(Speculator(target, drafter).generate(**inputs, **options), expected)


@pytest.mark.sparing
@pytest.mark.parametrize("name", TRIED)
def test_several_sequences_of_a_picture(name):
    model, inputs = model_of(name), prompts(name, ROWS["padded"])
    options = {"max_new_tokens": 8, "do_sample": True, "num_return_sequences": 2, "seeds": [1, 2, 3, 4]}
    together = Speculator(model).generate(**inputs, **options)
    again = model.generate(**inputs, **options, custom_generate=speculate(NoDrafter()))
    assert torch.equal(together, again)
    assert not torch.equal(together[0], together[1])


@pytest.mark.sparing
@pytest.mark.parametrize("name", TRIED)
def test_scores_and_rows_that_end_early(name):
    """Logits of rows that have ended are decoded anew, pictures included."""
    model, inputs = model_of(name), prompts(name, ROWS["padded"])
    plain = model.generate(**inputs, **GREEDY)
    ends = {"eos_token_id": int(plain[0, -NEW + 3]), "pad_token_id": 0}
    options = GREEDY | ends | {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    expected = model.generate(**inputs, **options)
    for drafter in (PromptLookup(), tiny_drafter(Target(model))):
        found = Speculator(Target(model), drafter).generate(**inputs, **options)
        assert torch.equal(found.sequences, expected.sequences)
        for mine, stock in zip((*found.logits, *found.scores), (*expected.logits, *expected.scores), strict=True):
            torch.testing.assert_close(mine, stock, rtol=1e-4, atol=1e-4)


def test_videos_give_what_generate_gives():
    model = model_of("Qwen2_5_VL")
    ids = torch.tensor([[3, 1, 92, *[91] * 4, 93, 5, 9]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": 2 * (ids == 91).int()}
    inputs |= {"video_grid_thw": torch.tensor([[2, 2, 4]]), "second_per_grid_ts": torch.tensor([2.0])}
    outputs = []
    for seed in range(2):
        torch.manual_seed(seed)
        inputs["pixel_values_videos"] = torch.randn(16, 1176)
        plain = model.generate(**inputs, **GREEDY)
        for right in RIGHT.values():
            drafter = ScriptedDrafter(texts_of(plain, inputs), right)
            assert torch.equal(Speculator(Target(model), drafter).generate(**inputs, **GREEDY), plain)
        outputs.append(plain)
    assert not torch.equal(*outputs)


def test_positions_of_the_callers_own():
    """Beside pictures they go to the model as they are, and later tokens follow the last one, as in `generate`."""
    model, inputs = model_of("SmolVLM"), prompts("SmolVLM", ROWS["one"])
    usual = model.generate(**inputs, **GREEDY)
    inputs["position_ids"] = 3 * torch.arange(inputs["input_ids"].shape[1]).unsqueeze(0)
    plain = model.generate(**inputs, **GREEDY)
    assert not torch.equal(plain, usual)
    drafter = ScriptedDrafter(texts_of(plain, inputs), (0, 3, 1, 4))
    assert torch.equal(Speculator(model, drafter).generate(**inputs, **GREEDY), plain)


def test_a_placeholder_outside_the_vocabulary():
    """Gemma 3 takes it; a drafter that looks it up must not fail."""
    model = model_of("Gemma3")
    model.config.image_token_index = model.config.image_token_id = TEXT["vocab_size"]
    inputs = prompts("Gemma3", ROWS["padded"])
    inputs["input_ids"][inputs["input_ids"] == PLACEHOLDER] = TEXT["vocab_size"]
    plain = model.generate(**inputs, **GREEDY)
    for drafter in (PromptLookup(), tiny_drafter(Target(model))):
        assert torch.equal(Speculator(model, drafter).generate(**inputs, **GREEDY), plain)
    inputs["input_ids"][0, -1] = TEXT["vocab_size"] + 1
    with pytest.raises(UserError, match="token 98 is not in the target's vocabulary of 97"):
        Speculator(model).generate(**inputs, **GREEDY)


def read(target, inputs, layers=()):
    """The prefill of prompts with pictures, as `generate` prepares them."""
    found = []

    def catch(_model, input_ids, logits_processor, stopping_criteria, generation_config, **prepared):
        mask = torch.ones_like(input_ids) if prepared["attention_mask"] is None else prepared["attention_mask"]
        shown = Pictures(input_ids, mask, prepared, "pixel_values")
        found.append(shown.prefill(target, range(len(mask)), layers))
        return input_ids

    target.model.generate(**inputs, max_new_tokens=1, custom_generate=catch)
    return found[0]


@pytest.mark.parametrize("name", TRIED)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_the_prefill_leaves_what_that_of_each_row_alone_leaves(name, cache):
    """Cache, features and tokens, without the padding."""
    target, (text, shown), layers = Target(model_of(name), cache), ROWS["text beside"], (0, 1)
    together = read(target, prompts(name, [text, shown]), layers)
    for place, alone in enumerate((prefill(target, [text], layers), read(target, prompts(name, [shown]), layers))):
        length = int(alone.lengths[0])
        assert int(together.lengths[place]) == length
        assert together.tokens[place].tolist() == (alone.tokens[0].tolist() + [alone.tokens[0, -1]] * 9)[:7]
        assert together.cache.get_seq_length() == 7
        close(together.features[place, :length], alone.features[0])
        close(together.logits[place], alone.logits[0])
        for mine, other in zip(together.cache.layers, alone.cache.layers, strict=True):
            close(mine.keys[place, :, :length], other.keys[0, :, :length])
            close(mine.values[place, :, :length], other.values[0, :, :length])


def close(mine, other):
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.sparing
@pytest.mark.parametrize("name", TRIED)
def test_a_target_with_a_static_cache(name):
    model, inputs = model_of(name), prompts(name, ROWS["padded"])
    plain = model.generate(**inputs, **GREEDY)
    drafter = ScriptedDrafter(texts_of(plain, inputs), (0, 3, 1, 4))
    assert torch.equal(Speculator(Target(model, "static"), drafter).generate(**inputs, **GREEDY), plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen2_5_VL", "SmolVLM"])
def test_compiled_and_exact_targets(name):
    model, inputs = model_of(name), prompts(name, ROWS["one"])
    plain = model.generate(**inputs, **GREEDY)
    drafter = ScriptedDrafter(texts_of(plain, inputs), (0, 3, 1, 4))
    for target in (exact_target(Target(model)), compile_target(Target(model), backend="eager")):
        assert torch.equal(Speculator(target, drafter).generate(**inputs, **GREEDY), plain)


def test_shifts_are_positions_of_pictures():
    """A picture of 2 x 2 merged patches is 4 tokens and 2 positions, one of 1 x 3 is 3 tokens and 3 positions."""
    target = Target(model_of("Qwen2_5_VL"))
    shift = read(target, prompts("Qwen2_5_VL", [[3, PICTURE, 1, PICTURE, 5], [2, 4, 6]])).shift
    assert shift.tolist() == [[0, 0], [-2, 0], [-2, 0], [-2, 0]]
    assert read(Target(model_of("SmolVLM")), prompts("SmolVLM", ROWS["padded"])).shift is None


# What is tried, and what is refused.


def test_a_target_is_tried_at_its_first_pictures(monkeypatch):
    model, inputs, tried = model_of("SmolVLM"), prompts("SmolVLM", ROWS["padded"]), []
    monkeypatch.setattr(Pictures, "_try", lambda *_: tried.append(1))
    fast = Speculator(model)
    fast.generate(**prompts("SmolVLM", [[3, 1, 4]]), **GREEDY)
    assert tried == []
    fast.generate(**inputs, **GREEDY)
    fast.generate(**inputs, **GREEDY)
    assert tried == [1]


def test_a_target_that_goes_on_otherwise_is_refused(monkeypatch):
    """Wrong positions behind a picture, which the trial over text cannot find."""
    model, inputs, forward = model_of("Qwen2_5_VL"), prompts("Qwen2_5_VL", ROWS["one"]), Target.forward

    def unshifted(self, *args, shift=None, **options):
        return forward(self, *args, **options)

    monkeypatch.setattr(Target, "forward", unshifted)
    with pytest.raises(UserError, match=r"goes on from pictures otherwise .* leave out pixel_values$"):
        Speculator(model).generate(**inputs, **GREEDY)


def test_pictures_that_do_not_fit_are_one_line():
    model, inputs = model_of("Gemma3"), prompts("Gemma3", ROWS["one"])
    inputs["input_ids"][0, 2] = 7
    with pytest.raises(UserError, match="cannot read pixel_values: Image features and image tokens do not match") as e:
        Speculator(model).generate(**inputs, **GREEDY)
    assert "\n" not in str(e.value)


def test_what_goes_with_text_alone_is_refused():
    model, inputs = model_of("Qwen2_5_VL"), prompts("Qwen2_5_VL", ROWS["one"])
    for more, message in (
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"inputs_embeds": torch.zeros(1, 1, 64)}, "token ids, not embeddings"),
    ):
        with pytest.raises(UserError, match=message):
            Speculator(model).generate(**inputs, **GREEDY, **more)
    types = {"mm_token_type_ids": inputs["mm_token_type_ids"]}
    with pytest.raises(UserError, match="cannot hand mm_token_type_ids to the model"):
        Speculator(model).generate(inputs["input_ids"], **types, **GREEDY)


@pytest.mark.parametrize(
    ("prepared", "message"),
    [
        ({"input_features": torch.ones(1, 4)}, "no sound; leave out input_features"),
        ({"audio_values": torch.ones(1, 4), "pixel_values": torch.ones(1, 4)}, "no sound; leave out audio_values"),
        ({"image_grid_thw": torch.ones(1, 3)}, "cannot hand image_grid_thw to the model"),
        (
            {"pixel_values": torch.ones(1, 4), "aspect_ratio_ids": torch.ones(1, 1)},
            "cannot hand aspect_ratio_ids to Gemma3ForConditionalGeneration beside pictures",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_inputs_are_refused_by_name(prepared, message):
    with pytest.raises(UserError, match=message):
        refuse_inputs(model_of("Gemma3"), torch.tensor([[3, 90, 5]]), prepared)


def test_a_model_that_needs_more_with_each_token_is_refused(monkeypatch):
    model, inputs = model_of("Gemma3"), prompts("Gemma3", ROWS["one"])
    prepare = type(model).prepare_inputs_for_generation

    def more(self, *args, **kwargs):
        return prepare(self, *args, **kwargs) | {"cross_attention_mask": torch.ones(1)}

    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", more)
    monkeypatch.setattr(type(model), "forward", without(type(model).forward, "cross_attention_mask"))
    with pytest.raises(UserError, match="needs cross_attention_mask with each token behind pictures; leave out pixel"):
        Speculator(model).generate(**inputs, **GREEDY)


def without(forward, name):
    @wraps(forward)
    def call(self, *args, **options):
        options.pop(name, None)
        return forward(self, *args, **options)

    return call


def test_targets_of_chains_read_text_alone():
    model = build("PaliGemma")
    target, inputs = Target.wrap(model), prompts("PaliGemma", ROWS["one"])
    assert target.chain is not None
    assert model.generate(**inputs, **GREEDY).shape[1] > NEW
    with pytest.raises(UserError, match="by chains, over text alone; leave out pixel_values"):
        Speculator(target).generate(**inputs, **GREEDY)
