"""Decoding under a budget is not slower than plain decoding: time by hand-written step times, text by a real batch."""

import pytest
import torch

from ctc_drafter.decode.batch import Batch
from ctc_drafter.decode.budget import Budget, Pace, StepTimes
from ctc_drafter.decode.generate import generate, generate_many, plain_generate
from ctc_drafter.decode.sampling import Sampled, warpers
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from helpers import VOCABULARY, ScriptedDrafter, tiny_drafter, tiny_target

ROWS, NEW = 32, 96
SIZES = (1, 2, 4, 8, 16)
GREEDY: dict = {}
# One row: a step reads the weights, and nodes cost little. Thirty-two: arithmetic counts, and nodes are dear.
TIMES = StepTimes(
    (1, ROWS),
    (64,),
    SIZES,
    plain=((1.0,), (1.6,)),
    draft=((0.2,), (0.4,)),
    whole=(((1.25, 1.3, 1.35, 1.4, 1.5),), ((2.4, 2.7, 3.3, 4.5, 7.0),)),
)


class FakeClock:
    """What the steps of a generation would have taken by `TIMES`, in a batch that reports them."""

    def __init__(self, monkeypatch):
        self.ms, self.sizes, self.asked = 0.0, [], 0
        advance, drafts = Batch.advance, Pace.drafts
        budget = Budget(TIMES, 16)

        def timed(batch):
            rows, asked = len(batch.rows), self.asked
            step = advance(batch)
            nodes = step.tree.tokens.shape[1] - 1
            curve = budget.curve(rows, 64)
            drafted = self.asked > asked
            self.ms += curve.cost(not drafted)[nodes] if drafted or nodes else curve.plain
            self.sizes.append(nodes)
            return step

        def counted(pace, rows):
            found = drafts(pace, rows)
            self.asked += found
            return found

        monkeypatch.setattr(Batch, "advance", timed)
        monkeypatch.setattr(Pace, "drafts", counted)
        self.budget = budget


def random_prompts(rows=ROWS):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCABULARY, (rows, 12), generator=generator).tolist()


def sampled():
    return {"sampler": Sampled(range(ROWS), warpers(temperature=1.0))}


def plain_ms(rows, steps):
    return Budget(TIMES, 16).curve(rows, 64).plain * steps


def useless(target, _scripts):
    """Untrained, so what it finds likely has nothing to do with the target."""
    return tiny_drafter(target)


def liar(_target, scripts):
    """Finds its drafts likely, and is always wrong."""
    return ScriptedDrafter(scripts, 0)


def copier(_target, _scripts):
    return PromptLookup()


@pytest.mark.parametrize("options", [GREEDY, sampled()], ids=["greedy", "temperature 1"])
@pytest.mark.parametrize("make", [useless, liar, copier])
@pytest.mark.parametrize("rows", [ROWS, 1])
def test_drafts_that_are_wrong_cost_next_to_nothing(rows, make, options, monkeypatch):
    """Random tokens are read, and what is drafted is wrong: 2 or 3 steps, then one after 4, 8, 16 and 32 plain ones."""
    target, prompts = tiny_target(), random_prompts(rows)
    if options:
        options = {"sampler": Sampled(range(rows), warpers(temperature=1.0))}
    plain = plain_generate(target, prompts, max_new_tokens=NEW, **options)
    scripts = [[*prompt, *tokens] for prompt, tokens in zip(prompts, plain.tokens, strict=True)]
    clock = FakeClock(monkeypatch)
    found = generate(target, make(target, scripts), prompts, max_new_tokens=NEW, budget=clock.budget, **options)
    assert found.tokens == plain.tokens
    assert clock.ms <= 1.07 * plain_ms(rows, NEW - 1)
    assert clock.asked <= 12 or clock.ms < plain_ms(rows, NEW - 1), "a draft that does not pay is not even computed"
    if make is not copier:
        assert sum(size == 0 for size in clock.sizes) >= 0.85 * len(clock.sizes)


@pytest.mark.parametrize("options", [GREEDY, sampled()], ids=["greedy", "temperature 1"])
def test_drafts_that_are_right_get_large_trees(options, monkeypatch):
    target, prompts = tiny_target(), random_prompts()
    plain = plain_generate(target, prompts, max_new_tokens=NEW, **options)
    scripts = [[*prompt, *tokens] for prompt, tokens in zip(prompts, plain.tokens, strict=True)]
    for rows, largest, times in ((1, 10, 2.5), (ROWS, 4, 1.2)):
        with monkeypatch.context() as patch:
            clock = FakeClock(patch)
            more = {"sampler": Sampled(range(rows), warpers(temperature=1.0))} if options else {}
            drafter = ScriptedDrafter(scripts[:rows], 4)
            found = generate(target, drafter, prompts[:rows], max_new_tokens=NEW, budget=clock.budget, **more)
            assert found.tokens == plain.tokens[:rows]
            assert max(clock.sizes) >= largest
            assert clock.ms < plain_ms(rows, NEW - 1) / times


def test_batches_in_a_row_that_drafts_do_not_help_try_less_and_less(monkeypatch):
    """Six requests of random tokens; then a text that is drafted well, after which all is as at first."""
    target, prompts = tiny_target(), random_prompts()
    plain = plain_generate(target, prompts, max_new_tokens=NEW)
    scripts = [[*prompt, *tokens] for prompt, tokens in zip(prompts, plain.tokens, strict=True)]
    clock = FakeClock(monkeypatch)
    asked, ms = [], []
    for right in (0, 0, 0, 0, 0, 0, 4, 0):
        clock.asked, clock.ms = 0, 0.0
        found = generate(target, ScriptedDrafter(scripts, right), prompts, max_new_tokens=NEW, budget=clock.budget)
        assert found.tokens == plain.tokens
        asked.append(clock.asked)
        ms.append(clock.ms / plain_ms(ROWS, NEW - 1))
    assert asked[0] == asked[-1] == 5, "the first step, and one after 4, 8, 16 and 32 more"
    assert asked[1:6] == [4, 3, 2, 2, 2], "the first rest is of 8 steps, 16, 32, and then 64"
    assert ms[5] < 1.02
    assert ms[6] < 0.85


def test_drafting_that_is_too_dear_for_thirty_two_rows_begins_when_one_is_left(monkeypatch):
    """Drafts with one right token a step pay for one row, and not for thirty-two."""
    target, prompts = tiny_target(), random_prompts()
    plain = plain_generate(target, prompts, max_new_tokens=NEW)
    scripts = [[*prompt, *tokens] for prompt, tokens in zip(prompts, plain.tokens, strict=True)]
    clock = FakeClock(monkeypatch)
    drafter = ScriptedDrafter(scripts, 1)
    ends = [tokens[: 40 if row else NEW] for row, tokens in enumerate(plain.tokens)]
    lengths = {row: len(tokens) for row, tokens in enumerate(ends)}
    rows_left = []
    keep = Batch.keep

    def cut(batch, places):
        keep(batch, [place for place in places if len(batch.rows[place].tokens) < lengths[batch.rows[place].index]])
        rows_left.append(len(batch.rows))

    monkeypatch.setattr(Batch, "keep", cut)
    found = generate(target, drafter, prompts, max_new_tokens=NEW, budget=clock.budget)
    assert found.tokens[0] == plain.tokens[0]
    alone = rows_left[1:].index(1)  # steps before that
    assert sum(size == 0 for size in clock.sizes[:alone]) >= 0.7 * alone
    assert sum(size > 0 for size in clock.sizes[alone:]) >= 0.7 * len(clock.sizes[alone:])


@pytest.mark.parametrize("wrong_after", [0, 4])
def test_rows_that_come_and_go(wrong_after, monkeypatch):
    target, prompts = tiny_target(), random_prompts(12)
    plain = plain_generate(target, prompts, max_new_tokens=24, eos=range(0, VOCABULARY, 9))
    scripts = [[*prompt, *tokens] for prompt, tokens in zip(prompts, plain.tokens, strict=True)]
    clock = FakeClock(monkeypatch)
    options = {"max_new_tokens": 24, "eos": range(0, VOCABULARY, 9), "budget": clock.budget}
    drafter = ScriptedDrafter(scripts, wrong_after)
    found = dict(generate_many(target, drafter, prompts, in_flight=4, **options))
    assert [found[row] for row in range(12)] == plain.tokens
