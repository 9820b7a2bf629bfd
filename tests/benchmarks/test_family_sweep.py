"""Every causal LM that transformers maps, small, over its length thresholds: refused in one line, or exact."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import transformers

from benchmarks.families import FAMILIES, Verdict, page
from benchmarks.family_checks import FEW, Plain, differences
from benchmarks.family_configs import CAUSAL, PICTURES, small_config, small_model
from benchmarks.family_page import outcomes_of, verdicts_of
from benchmarks.family_sweep import Outcome, every_family, outcome, sweep_page, taken, way_of, without_figures
from benchmarks.family_table import OVERRIDES, UNBUILT, Family
from ctc_drafter.target.checks import KERNELS, refuse_config, refuse_unsupported
from ctc_drafter.target.model import CACHES, Target
from ctc_drafter.types import UserError
from spoilt import POSITIONS, knows_positions, unnoticed, unnoticed_in_chains

PAGE = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
EVERY = {family.name: family for family in every_family()}
FAST = [
    *(
        "mistral",
        "mistral, wider window",
        "gemma3_text",
        "qwen2, sliding from the second layer",
        "gpt_neo, wider window",
    ),
    *("llama, yarn", "phi3, longrope", "ministral3, scaled by position", "granitemoehybrid, all attention"),
    *(
        "opt, as 350m",
        "deepseek_v3, yarn",
        "gpt_oss",
        "jamba, all attention",
        "llava, text alone",
        "doge, wider window",
    ),
    *("llama4_text, without chunks, scaled late", "bert, bidirectional", "nemotron_h, attention and moe"),
    *("mamba2", "lfm3", "jamba"),  # by chains; more in test_chains.py
]
ALL_ATTENTION = [name for name in EVERY if "all attention" in name or name.startswith("nemotron_h, attention")]


@pytest.fixture(autouse=True)
def quiet():
    """Small configurations warn of token ids beyond their vocabulary, recurrent models of missing kernels."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    yield
    transformers.logging.set_verbosity(before)


# What the page says, by the name of a family.
WRITTEN = {each.family.name: each for each in outcomes_of(PAGE, every_family())}


@lru_cache(1)
def taken_once(name: str) -> tuple[Target, Plain]:
    """Both tests of a family run one after the other (`EACH`). Raises `UserError` where it is refused."""
    target = taken(EVERY[name])
    return target, Plain.of(target, EVERY[name].short)


@pytest.mark.sparing(6)
@pytest.mark.parametrize("name", FAST)
def test_a_family_is_refused_or_exact_over_its_thresholds(name):
    found = outcome(EVERY[name], FEW)
    assert "\n" not in found.refusal
    assert found.different == ()


EACH = pytest.mark.parametrize("name", EVERY, scope="module")  # all tests of one family, then those of the next


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@EACH
def test_every_family_is_refused_or_exact_over_its_thresholds(name):
    """As the page says. Dynamic cache in all comparisons, static cache in a few."""
    try:
        target, plain = taken_once(name)
        found = Outcome(EVERY[name], "", tuple(differences(target, plain)), way_of(target))
    except UserError as error:
        found = Outcome(EVERY[name], str(error))
    assert "\n" not in found.refusal
    assert found.different == ()
    assert replace(found, refusal=without_figures(found.refusal)) == WRITTEN[name]
    if found.verified == "tree":
        static = Target.wrap(target.model, "static")
        assert differences(static, Plain.of(static, EVERY[name].short, plain.greedy), FEW) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@EACH
def test_every_family_that_is_taken_notices_a_spoilt_product(name):
    """Without it, a family whose text depends on nothing would pass."""
    if WRITTEN[name].refusal:
        return
    target, plain = taken_once(name)
    if target.chain is not None:
        assert unnoticed_in_chains(target, plain) == []
        return
    assert set(unnoticed(target, plain)) == (set() if knows_positions(target) else set(POSITIONS))


@pytest.mark.sparing
@pytest.mark.parametrize("name", ["mamba2", "lfm3"])
def test_a_spoilt_chain_is_noticed(name):
    target = taken(EVERY[name])
    assert unnoticed_in_chains(target, Plain.of(target)) == []


@pytest.mark.sparing(2)
@pytest.mark.parametrize("name", ["mistral", "opt, as 350m", "gemma3_text"])
def test_a_spoilt_product_is_noticed(name):
    target = taken(EVERY[name])
    assert unnoticed(target, Plain.of(target)) == []


def test_what_knows_no_positions_does_not_notice_them():
    target = taken(EVERY["jamba, all attention"])
    assert not knows_positions(target)
    assert set(unnoticed(target, Plain.of(target))) == set(POSITIONS)


def test_every_class_of_the_mappings_has_a_place():
    """Each is tried, or listed with the reason why not; no entry of the tables is for nothing."""
    tried = {(family.model_type, family.multimodal) for family in EVERY.values()}
    for kind in CAUSAL:
        assert (kind, False) in tried or kind in UNBUILT
    for kind in PICTURES:
        alone = f"{kind}, text alone"
        assert (kind, True) in tried or alone in UNBUILT or PICTURES[kind] == CAUSAL.get(kind)
    assert not {name for name in UNBUILT if name.removesuffix(", text alone") not in CAUSAL | PICTURES}
    assert len(EVERY) == len(every_family())
    assert set(OVERRIDES)


@pytest.mark.parametrize("name", ALL_ATTENTION)
def test_layers_are_asked_not_the_class(name):
    """Granite 4.0 dense and its like: the class may keep a recurrent state, this configuration does not."""
    model = small_model(EVERY[name])
    refuse_unsupported(model)


@pytest.mark.parametrize("kind", ["granitemoehybrid", "jamba", "qwen3_next", "qwen3_5_text", "rwkv", "zaya", "lfm2"])
def test_recurrent_layers_are_refused(kind):
    with pytest.raises(UserError, match="cannot follow a tree"):
        refuse_unsupported(small_model(Family(kind, kind)))


@pytest.mark.parametrize("kind", ["t5gemma2", "udop"])
def test_encoder_decoders_are_called_so(kind):
    with pytest.raises(UserError, match="is an encoder-decoder model"):
        refuse_config(small_config(Family(kind, kind, multimodal=True)))


@pytest.mark.parametrize("kind", ["bart", "whisper"])
def test_encoder_decoders_of_the_causal_mapping_too(kind):
    with pytest.raises(UserError, match="is an encoder-decoder model"):
        refuse_config(small_config(Family(kind, kind)))


def test_layers_that_take_no_mask_are_not_called_stateful():
    with pytest.raises(UserError, match="chunked_attention layers, which take no tree mask"):
        refuse_config(small_config(Family("llama4_text", "llama4_text")))


def test_a_model_without_a_number_of_layers_is_refused_in_one_line():
    with pytest.raises(UserError, match="does not say what it caches"):
        Target.wrap(small_model(Family("pi0", "pi0", multimodal=True)))


def test_the_page_is_what_its_families_make():
    """Every family is on it, once; whether each is as the page says is tested family by family."""
    assert [each.family for each in outcomes_of(PAGE, every_family())] == every_family()
    assert [each.name for each in verdicts_of(PAGE)] == [name for name, _, _ in FAMILIES]
    assert not [each for each in WRITTEN.values() if each.different]
    assert page(verdicts_of(PAGE)) + sweep_page(list(WRITTEN.values())) == PAGE


def test_what_is_read_back_is_what_was_written():
    first, second, third, fourth = every_family()[:4]
    outcomes = [
        Outcome(first, "keeps a | b"),
        Outcome(second, "", (), "tree"),
        Outcome(third, "", (), "chain, token by token"),
        Outcome(fourth, "", ("greedy, 8 nodes",), "tree"),
    ]
    verdicts = [
        Verdict("A", "", {(cache, kernel): f"{cache} {kernel}" for cache in CACHES for kernel in KERNELS}, "tree"),
        Verdict("B", "no | tree", {}),
    ]
    text = page(verdicts) + sweep_page(outcomes)
    assert verdicts_of(text) == verdicts
    *found, differing = outcomes_of(text, every_family())
    assert found == outcomes[:3]
    assert (differing.family, len(differing.different), differing.verified) == (fourth, 1, "tree")
    with pytest.raises(KeyError):
        outcomes_of(text, [first])
