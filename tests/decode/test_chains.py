"""Targets that follow chains alone: text of plain decoding, and as many accepted tokens as the drafts have right."""

from functools import cache

import pytest
import torch
import transformers

from benchmarks.family_checks import stock_continuations
from benchmarks.family_configs import small_model
from benchmarks.family_table import Family
from ctc_drafter.decode.batch import Batch, DecodingConfig, Method
from ctc_drafter.decode.budget import Budget, StepTimes
from ctc_drafter.decode.generate import generate, generate_many, new_rows, plain_generate, plain_generate_many
from ctc_drafter.decode.prefill import CHUNK, prefill
from ctc_drafter.decode.sampling import Sampled, warpers
from ctc_drafter.decode.stats import Stopwatch
from ctc_drafter.decode.verify import verify
from ctc_drafter.drafters.ctc import CTCDrafter
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.evaluate.exactness import ScriptedDrafter, ScriptedSession
from ctc_drafter.target import chain_cache
from ctc_drafter.target.cache import compact
from ctc_drafter.target.chain_cache import LONGEST_REPLAY
from ctc_drafter.target.chain_test import Chain, chain_tree
from ctc_drafter.target.compiled import compile_target
from ctc_drafter.target.model import Target
from ctc_drafter.types import Candidates, UserError

DEPTH = 4
PROMPTS = [[7, 11, 14, 11, 15, 19, 12, 16], [12, 17], [18, 12, 8, 11], [15]]
LENGTH = 26
# A recurrent state that is read behind again; attention without positions of its own, which is cut back.
REPLAYED, CUT = "mamba2", "bloom"
FAST = [REPLAYED, "lfm2"]
SLOW = [
    *("qwen3_next", "qwen3_5_text", "granitemoehybrid", "falcon_h1", "bamba", "kimi_linear", "llama4_text"),
    *("jamba", "zamba2", "nemotron_h", "olmo_hybrid", "lfm2_moe", "inkling_text", CUT, "gpt_neo"),
]
STEPPED, APART = ("jamba", "zamba2", "nemotron_h"), ("inkling_text",)
EVERY = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
# Two that compute several tokens otherwise than one: what they say of a whole text is not what `generate` reads.
ALIKE = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW if name not in STEPPED)]


@pytest.fixture(autouse=True)
def quiet():
    """Recurrent models warn that their fast kernels are missing."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    yield
    transformers.logging.set_verbosity(before)


@cache
def taken(name: str) -> tuple[Target, list[list[int]]]:
    """A small model of a type as a target, and what stock `generate` writes after each prompt."""
    model = small_model(Family(name, name))
    return Target.wrap(model), stock_continuations(model, PROMPTS, LENGTH)


class Script(ScriptedDrafter):
    """Drafts a single path, right for as long as `wrong_after` says."""

    def begin(self, embed, head, batch_size):
        return ScriptSession(self, list(range(batch_size)))


class ScriptSession(ScriptedSession):
    def levels(self, scripts):
        order = torch.arange(scripts.shape[1]).expand_as(scripts)
        return Candidates(scripts % self.drafter.vocab_size, order - 1, order + 1, -0.01 * order.float())


def scripted(name: str, right, texts=None) -> Script:
    target, expected = taken(name)
    texts = expected if texts is None else texts
    return Script([p + t for p, t in zip(PROMPTS, texts, strict=True)], right, target.vocab_size, DEPTH)


def counted(target: Target, monkeypatch) -> list[tuple[int, int]]:
    """Shapes of the target's forwards from now on."""
    shapes = []
    forward = Target.forward

    def count(self, tokens, *rest, **named):
        shapes.append(tuple(tokens.shape))
        return forward(self, tokens, *rest, **named)

    monkeypatch.setattr(Target, "forward", count)
    return shapes


@pytest.mark.parametrize("name", EVERY)
def test_accepted_tokens_are_as_many_as_are_right(name, monkeypatch):
    target, expected = taken(name)
    assert target.chain == Chain(stepped=name in STEPPED, together=name not in APART)
    shapes = counted(target, monkeypatch)
    options = {"max_new_tokens": LENGTH, "eos": ()}
    for right, accepted in ((DEPTH, [DEPTH] * 5), (0, None), ((0, 3, 1, 4), None)):
        for rows in (1, 3):
            shapes.clear()
            found = generate(target, scripted(name, right), PROMPTS[:rows], **options)
            assert found.tokens == expected[:rows]
            for row, counts in enumerate(found.accepted):
                wanted = [right] if isinstance(right, int) else list(right)
                assert max(counts[:-1]) == max(wanted)  # the last one may hit the end of the text
                assert accepted is None or counts == accepted
                assert right != 0 or set(counts) == {0}
                assert sum(counts) + len(counts) + 1 >= LENGTH, row
            if rows == 1:
                assert len(shapes) == 1 + len(found.accepted[0])  # the prompt, and one forward a step


def test_always_right_drafts_need_one_forward_in_depth_plus_one(monkeypatch):
    """And each is as long as the draft and its root: nothing is read twice."""
    target, expected = taken(REPLAYED)
    shapes = counted(target, monkeypatch)
    found = generate(target, scripted(REPLAYED, DEPTH), PROMPTS[:1], max_new_tokens=LENGTH, eos=())
    assert found.tokens == expected[:1]
    assert shapes == [(1, len(PROMPTS[0])), *[(1, DEPTH + 1)] * ((LENGTH - 1) // (DEPTH + 1))]


def test_rejected_drafts_are_read_behind_again_up_to_a_bound(monkeypatch):
    target, expected = taken(REPLAYED)
    shapes = counted(target, monkeypatch)
    found = generate(target, scripted(REPLAYED, 1), PROMPTS[:1], max_new_tokens=LENGTH, eos=())
    assert found.tokens == expected[:1]
    widths = [width for _, width in shapes[1:]]
    # Two tokens a step are committed; at more than eight a plain step lets the snapshot move on, and begins anew.
    period = [1 + DEPTH, 3 + DEPTH, 5 + DEPTH, 7 + DEPTH, 9 + DEPTH, 11]
    assert widths[:-1] == (period * 3)[: len(widths) - 1]
    assert found.accepted[0][: len(period)] == [1, 1, 1, 1, 1, 0]


def test_attention_alone_is_cut_back_and_reads_nothing_twice(monkeypatch):
    target, expected = taken(CUT)
    shapes = counted(target, monkeypatch)
    found = generate(target, scripted(CUT, (0, 2, 1)), PROMPTS[:1], max_new_tokens=LENGTH, eos=())
    assert found.tokens == expected[:1]
    assert {width for _, width in shapes[1:]} == {1 + DEPTH}


def test_rows_that_lag_behind_are_brought_up_together(monkeypatch):
    """Rows whose drafts differ in how right they are: no row reads again more than the bound and a draft."""
    target, expected = taken(REPLAYED)
    shapes = counted(target, monkeypatch)
    drafter = scripted(REPLAYED, (0, 3, 1))
    found = generate(target, drafter, PROMPTS, max_new_tokens=LENGTH, eos=())
    assert found.tokens == expected
    steps = [width for rows, width in shapes if rows == len(PROMPTS)]
    assert max(steps) <= LONGEST_REPLAY + 2 * (DEPTH + 1)


@pytest.mark.parametrize("name", EVERY)
def test_samples_are_those_of_plain_sampled_decoding(name):
    target, greedy = taken(name)
    sampler = Sampled([5, 6, 7, 8], warpers(temperature=0.8))
    options = {"max_new_tokens": LENGTH, "eos": (), "sampler": sampler}
    expected = plain_generate(target, PROMPTS, **options).tokens
    assert expected != greedy
    alone = plain_generate(target, PROMPTS[:1], max_new_tokens=LENGTH, eos=(), sampler=Sampled([5], sampler.processors))
    assert alone.tokens == expected[:1]
    for right in (DEPTH, (0, 3, 1)):
        found = generate(target, scripted(name, right, expected), PROMPTS, **options)
        assert found.tokens == expected
        assert max(map(max, found.accepted)) >= 3


@pytest.mark.parametrize("name", EVERY)
def test_rows_join_and_leave(name):
    target, expected = taken(name)
    eos = {expected[0][5], expected[1][9]}
    ends = [next((i for i, token in enumerate(text) if token in eos), LENGTH - 1) for text in expected]
    cropped = [text[: end + 1] for text, end in zip(expected, ends, strict=True)]
    for in_flight in (1, 2, 4):
        options = {"in_flight": in_flight, "max_new_tokens": LENGTH, "eos": eos}
        found = dict(generate_many(target, scripted(name, (0, 3, 1)), PROMPTS, **options))
        assert [found[row] for row in range(len(PROMPTS))] == cropped
        plain = dict(plain_generate_many(target, PROMPTS, **options))
        assert [plain[row] for row in range(len(PROMPTS))] == cropped


@pytest.mark.parametrize("name", [REPLAYED, "lfm2", pytest.param("bloom", marks=pytest.mark.slow)])
def test_rows_that_are_read_one_by_one_are_the_same(name):
    target, expected = taken(name)
    apart = Target(target.model, chain=Chain(together=False))
    for drafter in (scripted(name, (0, 3, 1)), scripted(name, DEPTH)):
        assert generate(apart, drafter, PROMPTS, max_new_tokens=LENGTH, eos=()).tokens == expected
        options = {"in_flight": 2, "max_new_tokens": LENGTH, "eos": {expected[0][5]}}
        found, wanted = (dict(generate_many(each, drafter, PROMPTS, **options)) for each in (apart, target))
        assert found == wanted
    assert plain_generate(apart, PROMPTS, max_new_tokens=LENGTH, eos=()).tokens == expected


@pytest.mark.parametrize("name", ALIKE)
@torch.inference_mode()
def test_logits_and_features_of_a_chain_are_those_of_its_text(name):
    """Features of a drafter come from the blocks, whatever was read again before them."""
    target, expected = taken(name)
    layers = (0, target.num_layers - 1)
    state = prefill(target, PROMPTS[:3], layers)
    for row, prompt in enumerate(PROMPTS[:3]):
        whole = target.hidden_features(torch.tensor([prompt]), layers)[0]
        torch.testing.assert_close(state.features[row, : len(prompt)], whole, rtol=1e-3, atol=1e-3)
    texts, cache = [list(prompt) for prompt in PROMPTS[:3]], state.cache
    for counts in ([2, 0, 1], [0, 3, 1], [3, 1, 2]):
        spans = [expected[row][len(text) - len(PROMPTS[row]) :][:4] for row, text in enumerate(texts)]
        tree = chain_tree(torch.tensor(spans))
        found = verify(target, cache, torch.tensor(list(map(len, texts))), tree, layers)
        for row, (text, span) in enumerate(zip(texts, spans, strict=True)):
            whole = target.hidden_features(torch.tensor([text + span]), layers)[0, len(text) :]
            torch.testing.assert_close(found.features[row], whole, rtol=1e-3, atol=1e-3)
            assert found.logits[row].argmax(-1).tolist() == expected[row][len(text) - len(PROMPTS[row]) + 1 :][:4]
            text += span[: counts[row] + 1]
        compact(cache, torch.zeros(3), 0, torch.zeros(3, 1), torch.tensor(counts))


@pytest.mark.parametrize("name", ["lfm2", pytest.param("qwen3_next", marks=pytest.mark.slow)])
def test_an_untrained_drafter_and_prompt_lookup_leave_the_text(name):
    target, expected = taken(name)
    torch.manual_seed(0)
    sizes = {"frames": 5, "draft_length": 4, "predictor_rank": 8, "predictor_width": 16}
    for drafter in (CTCDrafter.for_target(target.config, **sizes).eval(), PromptLookup()):
        assert generate(target, drafter, PROMPTS, max_new_tokens=LENGTH, eos=()).tokens == expected


def test_a_budget_chooses_the_length_of_chains_none_included():
    target, expected = taken(REPLAYED)
    cheap = StepTimes((1,), (64,), (1, 8), ((4.0,),), ((0.1,),), (((4.1, 4.2),),))
    dear = StepTimes((1,), (64,), (1, 8), ((4.0,),), ((0.1,),), (((40.0, 400.0),),))
    for times, most in ((cheap, DEPTH), (dear, 0)):
        budget = Budget(times, 8)
        found = generate(target, scripted(REPLAYED, DEPTH), PROMPTS[:2], max_new_tokens=LENGTH, eos=(), budget=budget)
        assert found.tokens == expected[:2]
        assert max(map(max, found.accepted)) == most


class Failing:
    """A sampler that fails when it is told to, after the target has read."""

    on = False

    def validate(self, row, logits):
        return

    def sample(self, logits, rows):
        return logits.argmax(-1)

    def sample_tree(self, tree, logits, rows):
        if self.on:
            raise UserError("row 1 fails")
        return logits.argmax(-1)


@pytest.mark.parametrize("name", [REPLAYED, "lfm2"])
@torch.inference_mode()
def test_a_step_that_fails_leaves_a_batch_as_it_was(name):
    target, expected = taken(name)
    fails = Failing()
    batch = Batch(
        Method(target, scripted(name, (0, 3, 1)), DecodingConfig(8, 0.0, fails)), Stopwatch(target.device, False)
    )
    rows = new_rows(target, PROMPTS, LENGTH, ())
    for row, first in zip(rows, batch.admit(rows), strict=True):
        row.tokens.append(first)
    while min(len(row.tokens) for row in rows) < LENGTH:
        fails.on = not fails.on
        if fails.on:
            before = batch.cache.get_seq_length(), batch.lengths.tolist(), batch.root.tolist()
            with pytest.raises(UserError, match="row 1"):
                batch.step()
            assert before == (batch.cache.get_seq_length(), batch.lengths.tolist(), batch.root.tolist())
            continue
        tokens, counts = batch.step().emitted()
        for row, new, count in zip(rows, tokens, counts, strict=True):
            row.tokens += new[: count + 1]
    assert [row.tokens[:LENGTH] for row in rows] == expected


@torch.inference_mode()
def test_a_row_that_memory_does_not_suffice_for_leaves_the_others_as_they_were(monkeypatch):
    target, expected = taken("lfm2")
    batch = Batch(Method(target, scripted("lfm2", (0, 3, 1))), Stopwatch(target.device, False))
    rows = new_rows(target, PROMPTS, LENGTH, ())
    first = rows[:2]
    for row, token in zip(first, batch.admit(first), strict=True):
        row.tokens.append(token)
    calls, real = iter(range(9)), chain_cache.append_rows

    def failing(*given):
        if next(calls) == 1:
            raise torch.OutOfMemoryError
        real(*given)

    monkeypatch.setattr(chain_cache, "append_rows", failing)
    with pytest.raises(torch.OutOfMemoryError):
        batch.admit(rows[2:3])
    monkeypatch.undo()
    while min(len(row.tokens) for row in first) < LENGTH:
        tokens, counts = batch.step().emitted()
        for row, new, count in zip(first, tokens, counts, strict=True):
            row.tokens += new[: count + 1]
    assert [row.tokens[:LENGTH] for row in first] == expected[:2]


def test_a_long_prompt_is_read_in_parts(monkeypatch):
    target, _ = taken("lfm2")
    prompt = [n % 80 + 6 for n in range(70)]
    expected = stock_continuations(target.model, [prompt], LENGTH)
    monkeypatch.setattr("ctc_drafter.decode.prefill.CHUNK", 32)
    shapes = counted(target, monkeypatch)
    assert plain_generate(target, [prompt], max_new_tokens=LENGTH, eos=()).tokens == expected
    assert shapes[:4] == [(1, 32), (1, 32), (1, 6), (1, 1)]
    assert CHUNK > 70


def test_a_chain_target_is_not_compiled_and_has_no_static_cache():
    target, _ = taken(REPLAYED)
    with pytest.raises(UserError, match="cannot follow a tree"):
        Target.wrap(target.model, cache="static")
    with pytest.raises(UserError, match="leave out --compile"):
        compile_target(target)
