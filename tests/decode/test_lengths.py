"""Targets whose forward depends on how long the text is: equal to stock `generate`, or refused in one line."""

from functools import cache

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from ctc_drafter.decode.generate import generate, generate_many, plain_generate
from ctc_drafter.decode.hf import speculate
from ctc_drafter.decode.sampling import Sampled, warpers
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.target.compiled import compile_target
from ctc_drafter.target.model import CACHES, Target
from ctc_drafter.types import UserError
from helpers import VOCABULARY, ScriptedDrafter, tiny_target

SWITCH, NEW = 24, 32
LENGTHS = (7, 22, SWITCH - 1, SWITCH, SWITCH + 1, 40)  # crosses while decoding, at once, and before
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2, 4, 8, 16],
}
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 256, "initializer_range": 0.5,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
ORIGINAL = {"original_max_position_embeddings": SWITCH}
KINDS = {
    "phi3": ORIGINAL | {"rope_parameters": LONGROPE},  # stock reads anew at the switch
    "llama": {"rope_parameters": LONGROPE | ORIGINAL | {"factor": 4.0}},  # stock keeps its cache
    "phi3, sliding": ORIGINAL | {"rope_parameters": LONGROPE, "sliding_window": 8},
    "phimoe": {
        "num_local_experts": 4,
        "rope_parameters": LONGROPE | ORIGINAL | {"short_mscale": 1.1, "long_mscale": 1.3},
    },
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def tiny(kind, **settings):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | settings)).eval()


def stock(model, prompts, new=NEW, **options):
    """What transformers' own `generate` writes after each prompt alone."""
    rows = [torch.tensor([prompt]) for prompt in prompts]
    settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    return [model.generate(r, attention_mask=torch.ones_like(r), **settings)[0, r.shape[1] :].tolist() for r in rows]


def prompts(*lengths):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@cache
def longrope(kind):
    model = tiny(kind.split(",")[0], **KINDS[kind])
    return model, stock(model, prompts(*LENGTHS))


SHAPES = [
    pytest.param(right, nodes, marks=() if (right, nodes) in ((0, 8), (4, 1), ((0, 3, 1, 4), 32)) else pytest.mark.slow)
    for right in (0, 4, (0, 3, 1, 4))
    for nodes in (1, 8, 32)
]


@pytest.mark.sparing(4)
@pytest.mark.parametrize(("right", "nodes"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_longrope_rows_of_any_length_go_on_as_stock(kind, right, nodes):
    model, expected = longrope(kind)
    rows = prompts(*LENGTHS)
    scripts = [prompt + text for prompt, text in zip(rows, expected, strict=True)]
    for layout in CACHES:
        target = Target.wrap(model, layout)
        assert target.switch == SWITCH
        found = generate(target, ScriptedDrafter(scripts, right), rows, max_new_tokens=NEW, nodes=nodes)
        assert found.tokens == expected
    if (right == 4 and nodes > 1) or (right == (0, 3, 1, 4) and nodes == 32):
        assert found.stats.beta > (3 if right == 4 else 2)  # trees were there, on both sides


@pytest.mark.sparing(2)
@pytest.mark.parametrize("kind", KINDS)
def test_longrope_decodes_plainly_and_in_a_queue_as_stock(kind):
    model, expected = longrope(kind)
    target = Target.wrap(model)
    assert plain_generate(target, prompts(*LENGTHS), max_new_tokens=NEW).tokens == expected
    found = dict(generate_many(target, PromptLookup(), prompts(*LENGTHS), max_new_tokens=NEW, in_flight=2))
    assert [found[place] for place in range(len(LENGTHS))] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_the_factors_matter_to_these_models(kind):
    """A text that crosses the switch is another one where the factors never change."""
    model, expected = longrope(kind)
    settings = KINDS[kind]
    short = settings["rope_parameters"] | {"long_factor": LONGROPE["short_factor"]}
    if kind == "phimoe":
        short["long_mscale"] = short["short_mscale"]
    other = tiny(kind.split(",")[0], **settings | {"rope_parameters": short})
    other.load_state_dict(model.state_dict())
    assert stock(other, prompts(7)) != expected[:1]


@pytest.mark.sparing(2)
@pytest.mark.parametrize("kind", KINDS)
def test_longrope_samples_as_plain_sampled_decoding(kind):
    target, rows = Target.wrap(longrope(kind)[0]), prompts(*LENGTHS)
    sampler = Sampled([*range(len(rows))], warpers(temperature=0.8, top_p=0.9))
    expected = plain_generate(target, rows, max_new_tokens=NEW, sampler=sampler).tokens
    scripts = [prompt + text for prompt, text in zip(rows, expected, strict=True)]
    drafter = ScriptedDrafter(scripts, (0, 3, 1, 4))
    assert generate(target, drafter, rows, max_new_tokens=NEW, sampler=sampler).tokens == expected


def test_prompts_in_chunks_are_read_with_the_factors_of_the_whole(monkeypatch):
    model, expected = longrope("phi3")
    monkeypatch.setattr("ctc_drafter.decode.prefill.CHUNK", 5)
    assert plain_generate(Target.wrap(model), prompts(*LENGTHS), max_new_tokens=NEW).tokens == expected


def test_a_forward_leaves_the_factors_and_hooks_of_the_model_alone():
    model = longrope("phi3")[0]
    module = model.model.rotary_emb
    names = set(vars(module))
    generate(Target.wrap(model), PromptLookup(), prompts(7), max_new_tokens=NEW)
    assert not module._forward_hooks
    assert set(vars(module)) <= names | {"long_inv_freq"}  # transformers' own


@pytest.mark.sparing(2)
@pytest.mark.parametrize("kind", KINDS)
def test_longrope_in_generate(kind):
    """A row, and rows of one length, as stock; with padding stock looks at the padded length, which is refused."""
    model, expected = longrope(kind)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for place, prompt in enumerate(prompts(*LENGTHS)):
        found = model.generate(torch.tensor([prompt]), custom_generate=speculate(PromptLookup()), **options)
        assert found[0, len(prompt) :].tolist() == expected[place]
    ids = torch.tensor(prompts(22, 22, 22))
    mask = torch.ones_like(ids)
    found = model.generate(ids, attention_mask=mask, custom_generate=speculate(PromptLookup()), **options)
    assert found.tolist() == model.generate(ids, attention_mask=mask, **options).tolist()
    mask[0, :3] = 0
    with pytest.raises(UserError, match="one at a time"):
        model.generate(ids, attention_mask=mask, custom_generate=speculate(PromptLookup()), **options)
    options["max_new_tokens"] = 2
    found = model.generate(ids, attention_mask=mask, custom_generate=speculate(PromptLookup()), **options)
    assert found.tolist() == model.generate(ids, attention_mask=mask, **options).tolist()


def test_longrope_is_not_compiled():
    with pytest.raises(UserError, match="longrope"):
        compile_target(Target.wrap(longrope("phi3")[0]))


def test_frequencies_that_follow_the_length_end_at_the_context():
    model = tiny(
        "llama", max_position_embeddings=32, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    )
    target = Target.wrap(model)
    assert target.limit == 32
    expected = stock(model, prompts(20), 13)
    assert generate(target, PromptLookup(), prompts(20), max_new_tokens=13).tokens == expected
    with pytest.raises(UserError, match="at most 13 new tokens"):
        generate(target, PromptLookup(), prompts(20), max_new_tokens=14)


def test_rotary_targets_go_on_beyond_their_context_as_stock():
    target = tiny_target(max_position_embeddings=16, eos_token_id=None)
    rows = prompts(12, 2, 20)
    expected = stock(target.model, rows)
    scripts = [prompt + text for prompt, text in zip(rows, expected, strict=True)]
    assert [len(text) for text in expected] == [NEW] * 3
    assert generate(target, ScriptedDrafter(scripts, 4), rows, max_new_tokens=NEW).tokens == expected
    ids = torch.tensor(rows[:1])
    found = target.model.generate(ids, custom_generate=speculate(PromptLookup()), max_new_tokens=NEW, pad_token_id=0)
    assert found[0, 12:].tolist() == expected[0]


def learned():
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.5, eos_token_id=None, bos_token_id=None)).eval()


def test_learned_positions_end_where_their_table_does():
    """The last token is written without being read, as in stock `generate`."""
    model = learned()
    target = Target.wrap(model)
    expected = stock(model, prompts(20, 3), 13)
    assert generate(target, PromptLookup(), prompts(20, 3), max_new_tokens=13).tokens == expected
    with pytest.raises(IndexError):
        stock(model, prompts(20), 14)
    for call in (
        lambda: generate(target, PromptLookup(), prompts(3, 20), max_new_tokens=14),
        lambda: plain_generate(target, prompts(3, 20), max_new_tokens=14),
        lambda: list(generate_many(target, PromptLookup(), prompts(3, 20), max_new_tokens=14)),
    ):
        with pytest.raises(UserError, match=r"prompt 1 has 20 tokens .* at most 13 new tokens"):
            call()
    with pytest.raises(UserError, match=r"prompt 0 has 20 tokens .* at most 13 new tokens"):
        model.generate(
            torch.tensor(prompts(20)), custom_generate=speculate(PromptLookup()), max_new_tokens=14, pad_token_id=0
        )


def test_the_context_that_yarn_is_made_for_counts():
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
    assert tiny_target(max_position_embeddings=32, rope_parameters=rope).context == 128


def same_by_chains(model, *lengths):
    """It follows chains, and writes what stock `generate` writes of each row, alone and in a ragged batch."""
    target = Target.wrap(model)
    assert target.chain is not None
    asked = prompts(*lengths)
    expected = stock(model, asked)
    scripts = [prompt + answer for prompt, answer in zip(asked, expected, strict=True)]
    for wrong_after in (0, 2, 4):
        drafter = ScriptedDrafter(scripts, wrong_after)
        assert generate(target, drafter, asked, max_new_tokens=NEW, eos=()).tokens == expected
        alone = ScriptedDrafter(scripts[:1], wrong_after)
        assert generate(target, alone, asked[:1], max_new_tokens=NEW, eos=()).tokens == expected[:1]


def test_windows_that_count_slots_are_followed_by_chains():
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "initializer_range": 0.5}
    config = AutoConfig.for_model("gpt_neo", **sizes, attention_types=[[["global", "local"], 1]], eos_token_id=None)
    torch.manual_seed(0)
    same_by_chains(AutoModelForCausalLM.from_config(config).eval(), 240, 7, 260)  # window_size = 256


@pytest.mark.parametrize("size", [8, 2048])
def test_attention_that_chooses_its_keys_is_refused(size):
    with pytest.raises(UserError, match="keep_window_size"):
        Target.wrap(tiny("doge", keep_window_size=size))


@pytest.mark.sparing
@pytest.mark.parametrize("size", [16, 64])
def test_temperature_tuning_by_slots_is_followed_by_chains(size):
    tuned = {"layer_types": ["full_attention"] * 2, "num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 8}
    model = tiny("llama4_text", **tuned, no_rope_layers=[0, 0], floor_scale=size, attn_scale=4.0)
    same_by_chains(model, size - 5, 7, size + 3)
