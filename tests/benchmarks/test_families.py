"""Families of models, tiny and random: each is exact or refused, and docs/families.md says which."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.families import (
    FAMILIES,
    NEW_TOKENS,
    PROMPTS,
    Verdict,
    drafters,
    exact,
    family_config,
    family_model,
    main,
    verdict,
)
from benchmarks.family_checks import stock_continuations
from benchmarks.family_page import verdicts_of
from benchmarks.family_sweep import without_figures
from ctc_drafter.decode.generate import generate, plain_generate
from ctc_drafter.decode.sampling import Sampled, warpers
from ctc_drafter.drafters.registry import fresh_drafter
from ctc_drafter.target.checks import KERNELS
from ctc_drafter.target.features import decoder_blocks, final_norm
from ctc_drafter.target.model import CACHES, Target
from ctc_drafter.types import UserError
from tiny_models import tiny_tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
NAMES = [name for name, _, _ in FAMILIES]
FIRST_CHAIN, FIRST_REFUSED = NAMES.index("Falcon, alibi"), NAMES.index("BERT, bidirectional")
ACCEPTED, CHAINS, REFUSED = NAMES[:FIRST_CHAIN], NAMES[FIRST_CHAIN:FIRST_REFUSED], NAMES[FIRST_REFUSED:]
WRITTEN = {each.name: each for each in verdicts_of(PAGE)}  # what docs/families.md says
KINDS = ["Llama", "Qwen2, sliding from the second layer", "Mistral, sliding", "Gemma 3", "OPT", "Mixtral"]
# All of them are in the slow tests; a sweep over small ones of more families is in the fast (test_family_sweep.py).
FAST = ["Llama", "OPT"]
FEW_FAST = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in ACCEPTED]


def known(name: str) -> Verdict:
    """What a family turns out to be, which is what the page says."""
    found = verdict(name)
    assert replace(found, refusal=without_figures(found.refusal)) == WRITTEN[name]
    return found


@cache
def model_and_text(name: str):
    model = family_model(name)
    return model, stock_continuations(model, PROMPTS, NEW_TOKENS)


@pytest.mark.parametrize("name", FEW_FAST)
def test_never_always_and_sometimes_right_drafts_leave_the_text_of_generate(name):
    """Both caches, both kernels, batch 1 and 3, and an untrained CTC drafter as well."""
    found = known(name)
    assert found.refusal == ""
    assert set(found.cells.values()) <= {"exact", "not offered"}
    assert [found.cells[cache, "eager"] for cache in CACHES] == ["exact"] * len(CACHES)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in CHAINS])
def test_drafts_in_chains_leave_the_text_of_generate(name):
    found = known(name)
    assert found.refusal == ""
    assert found.verified.startswith("chain")
    assert {found.cells["dynamic", kernel] for kernel in KERNELS} <= {"exact", "not offered"}
    assert found.cells["dynamic", "eager"] == "exact"


@pytest.mark.parametrize("name", FEW_FAST)
def test_the_text_can_tell_right_from_wrong(name):
    _, texts = model_and_text(name)
    assert len({token for text in texts for token in text}) >= NEW_TOKENS // 2
    assert len({tuple(text) for text in texts}) == len(texts)


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 64])
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", KINDS)
def test_other_tree_sizes_leave_the_text_unchanged(name, kind, nodes):
    model, expected = model_and_text(name)
    assert exact(Target.wrap(model, kind), expected, nodes)
    assert not exact(Target.wrap(model, kind), [text[::-1] for text in expected], nodes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", FEW_FAST)
def test_samples_are_those_of_plain_sampled_decoding(name, kind):
    """With the common stream, in a batch and alone: the same tokens, whatever was drafted."""
    target = Target.wrap(model_and_text(name)[0], kind)
    prompts, sampler = [list(prompt) for prompt in PROMPTS], Sampled([5, 6, 7], warpers(temperature=0.8, top_p=0.9))
    texts = plain_generate(target, prompts, max_new_tokens=NEW_TOKENS, eos=(), sampler=sampler).tokens
    assert texts != [list(text) for text in model_and_text(name)[1]]
    options = {"max_new_tokens": NEW_TOKENS, "nodes": 8, "eos": (), "sampler": sampler}
    for drafter in drafters(target, [prompt + text for prompt, text in zip(prompts, texts, strict=True)]):
        for rows in (1, len(prompts)):
            found = generate(target, drafter, prompts[:rows], **options)
            assert found.tokens == texts[:rows]


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_follow_neither_tree_nor_chain_is_refused_in_one_line(name):
    refusal = known(name).refusal
    assert refusal
    assert "\n" not in refusal


def test_the_command_needs_a_place(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "page" in capsys.readouterr().err


@pytest.mark.parametrize("name", FEW_FAST)
@torch.inference_mode()
def test_features_norm_embeddings_and_head_are_found(name):
    model, _ = model_and_text(name)
    target = Target(model)
    tokens = torch.tensor([PROMPTS[0]])
    depth = target.num_layers
    everything = model(tokens, output_hidden_states=True, use_cache=False)
    features = target.hidden_features(tokens, range(depth))
    for layer, part in enumerate(features.split(target.hidden_size, -1)[:-1]):
        torch.testing.assert_close(part, everything.hidden_states[layer + 1])
    last = final_norm(model)(features[..., -target.hidden_size :])
    torch.testing.assert_close(last, everything.hidden_states[-1])
    assert len(decoder_blocks(model)) == depth
    # Soft caps and logit scales are monotonous: the head's own argmax is the model's.
    assert torch.equal(target.head(last).argmax(-1), everything.logits.argmax(-1))
    assert target.embed(tokens).shape == (1, len(PROMPTS[0]), target.hidden_size)


@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "GPT-2", "OPT", "Cohere 2"])
def test_the_norm_scale_is_what_the_final_norm_multiplies_by(name):
    model = family_model(name)
    norm = final_norm(model)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
        if getattr(norm, "bias", None) is not None:
            norm.bias.uniform_(-1.0, 1.0)
    stored = norm.weight + 1 if name == "Gemma 3" else norm.weight
    torch.testing.assert_close(Target(model).norm_scale, stored.detach(), atol=1e-4, rtol=1e-4)


def test_a_target_with_narrow_embeddings_gets_no_ctc_drafter():
    config = family_config("OPT")
    config.word_embed_proj_dim = 16
    target = Target.wrap(AutoModelForCausalLM.from_config(config).eval())
    with pytest.raises(UserError, match="embeddings have 16"):
        fresh_drafter(target, tiny_tokenizer(), 0)
