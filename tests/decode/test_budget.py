"""Tree sizes that pay: the choice by hand, and decoding under a budget."""

import itertools
import math

import numpy as np
import pytest
import torch

from ctc_drafter.decode import budget as budget_file
from ctc_drafter.decode.budget import LONGEST_REST, REST, START, Budget, Pace, StepTimes, ascending
from ctc_drafter.decode.generate import generate, plain_generate
from ctc_drafter.decode.prefill import prefill
from ctc_drafter.decode.profile import measure, step_times
from ctc_drafter.decode.tree import build_tree
from ctc_drafter.decode.verify import follow
from ctc_drafter.drafters.trainable import network_of
from ctc_drafter.types import Candidates
from helpers import ScriptedDrafter, tiny_drafter, tiny_target

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6]]


def times(plain=4.0, draft=1.0, whole=(6.0, 7.0, 9.0), sizes=(1, 2, 4)):
    return StepTimes((1,), (100,), sizes, ((plain,),), ((draft,),), ((tuple(whole),),))


def tried(budget):
    """A pace whose first step was worth what it is thought to be worth, so that the next one is no trial."""
    pace = Pace(budget)
    pace.network.pauses(1).note(START)
    return pace


def siblings(*probabilities):
    """Children of the root, one row."""
    count = len(probabilities)
    tokens, ones = torch.arange(count)[None], torch.ones(1, count, dtype=torch.long)
    return Candidates(tokens, -ones, ones, torch.tensor([probabilities]).log())


def test_times_between_the_measured_ones():
    table = StepTimes(
        (1, 3),
        (100, 300),
        (2,),
        plain=((4.0, 6.0), (8.0, 12.0)),
        draft=((1.0, 1.0), (2.0, 2.0)),
        whole=(((6.0,), (8.0,)), ((14.0,), (18.0,))),
    )
    curve = Budget(table, 2).curve(2, 192)  # contexts count in steps of 64
    share = 0.46
    assert curve.plain == pytest.approx((4 + 2 * share + 8 + 4 * share) / 2)
    draft = 1.5
    assert curve.whole[0] == pytest.approx(curve.plain + draft)
    assert curve.whole[2] == pytest.approx((6 + 2 * share + 14 + 4 * share) / 2)
    assert curve.whole[1] == pytest.approx((curve.whole[0] + curve.whole[2]) / 2)
    assert Budget(table, 2).curve(9, 9000).plain == 12.0


def test_noise_never_makes_more_nodes_cheaper():
    whole = Budget(times(whole=(6.0, 5.0, 9.0)), 4).curve(1, 100).whole
    assert whole.tolist() == [5.0, 5.5, 5.5, 7.25, 9.0]


@pytest.mark.parametrize("times", [[3.0], [1.0, 2.0, 2.0], [3.0, 2.0, 1.0], [1.0, 4.0, 2.0, 3.0, 2.5]])
def test_times_that_never_fall_are_the_nearest_such_ones(times):
    """Nearer than any others on a grid, and no further from them than the grid is fine."""
    found = ascending(times)
    assert found == sorted(found)

    def distance(others):
        return sum((a - b) ** 2 for a, b in zip(times, others, strict=True))

    grid = np.arange(8, 33) / 8
    nearest = min(map(distance, itertools.combinations_with_replacement(grid, len(times))))
    assert nearest - 0.02 * len(times) <= distance(found) <= nearest


@pytest.mark.parametrize(
    ("probabilities", "nodes"),
    [
        # A node adds 1 ms, and a ms is worth 1.15 tokens in 4.
        ((0.5, 0.30, 0.27, 0.1), 2),
        ((0.9, 0.05, 0.04, 0.01), 1),
        ((0.28, 0.28, 0.28, 0.28), 0),
        ((0.45, 0.45, 0.45, 0.45), 4),
        ((), 0),
    ],
)
def test_nodes_that_bring_more_than_their_time_is_worth(probabilities, nodes):
    assert tried(Budget(times(), 4)).size(siblings(*probabilities), 100) == nodes


def test_a_trial_is_no_large_tree():
    """4 nodes would pay, if the drafter is right; that is not known yet, and 3 take half a plain step longer than 1."""
    pace = Pace(Budget(times(), 4))
    assert pace.size(siblings(0.45, 0.45, 0.45, 0.45), 100) == 3
    assert Pace(Budget(times(whole=(6.0, 8.1, 9.0)), 4)).size(siblings(0.9, 0.9), 100) == 1


def test_a_node_below_the_floor_never_pays():
    budget = Budget(times(), 4)
    min_probability = budget.curve(1, 100).min_probability
    assert min_probability == pytest.approx((9 - 6) / 3 / 4)
    pace = tried(budget)
    assert pace.size(siblings(0.9, *[0.9 * min_probability] * 3), 100) == 1
    assert pace.size(siblings(0.9, *[1.3 * min_probability] * 3), 100) == 4
    assert pace.min_probability(1, 100) < min_probability


def test_what_was_copied_for_nothing_is_not_charged_for_drafting():
    """It is worth its nodes where a draft would not be, and says nothing of what drafts are worth."""
    poor = siblings(0.28, 0.28, 0.28, 0.28)
    free = Candidates(poor.tokens, poor.parents, poor.depths, poor.scores, free=True)
    budget, tree = Budget(times(whole=(6.0, 6.5, 7.5)), 4), build_tree(torch.tensor([0]), poor, 4)
    pace = Pace(budget)
    pace.network.trust.value = 0.5
    assert pace.drafts(1)
    assert (pace.size(poor, 100), pace.size(free, 100)) == (0, 4)
    pace.note(100, tree, follow(tree, torch.tensor([[1, 9, 9, 9, 9]])))
    assert (pace.network.pauses(1).gain.value, pace.network.trust.value) == (START, 0.5)
    assert pace.copies.trust.value < 1, "1 accepted for 1.12 expected"


def test_copies_that_are_never_right_are_left_out_and_tried_again_later():
    """Four in a chain, all but certain by themselves: 4 nodes that a step of 4 ms becomes one of 6.5 for."""
    order = torch.arange(4)[None]
    copied = Candidates(order, order - 1, order + 1, torch.full((1, 4), -0.01), free=True)
    pace = Pace(Budget(times(whole=(6.0, 6.5, 7.5)), 4))
    verified = []
    for _ in range(200):
        pace.drafts(1)
        tree = build_tree(torch.tensor([9]), copied, pace.size(copied, 100))
        verified.append(tree.tokens.shape[1] - 1)
        pace.note(100, tree, follow(tree, torch.full_like(tree.tokens, 50)))
    assert verified[0] == 4
    assert sum(map(bool, verified)) == 2 + 6, "2, and one each after 4, 8, 16, 32, 64 and 64 without them"
    assert any(verified[50:])


def test_drafting_that_does_not_pay_rests_longer_each_time():
    pace, wrong = Pace(Budget(times(), 4)), []
    candidates = siblings(0.4, 0.3)
    tree = build_tree(torch.tensor([0]), candidates, 2)
    refused = follow(tree, torch.full_like(tree.tokens, 50))
    for step in range(60):
        if pace.drafts(1):
            wrong.append(step)
        pace.note(100, tree, refused)
    rests = [gap - 1 for gap in np.diff(wrong).tolist() if gap > 1]
    assert rests == [REST, 2 * REST, 4 * REST]
    assert len(wrong) <= 5 + 2 * len(rests)
    accepted = follow(tree, torch.tensor([[0, 5, 5]]))
    assert accepted.counts.tolist() == [1]
    pauses = pace.network.pauses(1)
    pace.budget, pauses.waiting = Budget(times(whole=(5.0, 5.1, 5.2)), 4), 0
    for _ in range(20):
        assert pace.drafts(1)
        pace.note(100, tree, accepted)
    assert pauses.gain.value > 1.2
    assert pauses.rest == REST


def test_where_no_text_could_make_drafts_pay_the_longest_rest_comes_first():
    hopeless = Budget(times(whole=(8.0, 11.0, 15.0)), 4)  # in plain steps 2, 2.75, 3.75: more than 1.7, 2.1 and 2.6
    assert hopeless.curve(1, 0).hopeless
    assert not Budget(times(whole=(8.0, 10.0, 10.0)), 4).curve(1, 0).hopeless
    pace = Pace(hopeless)
    assert [pace.drafts(1) for _ in range(LONGEST_REST + 1)] == [False] * LONGEST_REST + [True]


def test_what_does_not_pay_for_many_rows_may_pay_for_few():
    """Thirty-two rows rest; once one is left of them it drafts at once."""
    pace = Pace(Budget(times(), 4))
    pace.network.pauses(32).waiting = 60
    assert [pace.drafts(rows) for rows in (32, 33, 1, 40, 2)] == [False, False, True, False, True]


WRONG_TIMES = [
    {"batches": ()},
    {"batches": (1, 1)},
    {"sizes": (2, 1)},
    {"sizes": (0, 1)},
    {"contexts": (100, 200)},
    {"plain": ((0.0,),)},
    {"plain": ((math.nan,),)},
    {"draft": ()},
    {"draft": ((math.inf,),)},
    {"whole": (((6.0,),),)},
    {"whole": (((6.0, -1.0),),)},
]


@pytest.mark.parametrize("wrong", WRONG_TIMES)
def test_a_damaged_profile_is_none(wrong):
    right = {"batches": (1,), "contexts": (100,), "sizes": (1, 2), "plain": ((4.0,),), "draft": ((1.0,),)}
    right |= {"whole": (((6.0, 7.0),),)}
    StepTimes(**right)
    with pytest.raises(ValueError, match=r"step|rows"):
        StepTimes(**right | wrong)


@pytest.mark.parametrize("wrong_after", [0, 2, 4])
def test_output_is_plain_decodings_and_idle_drafters_are_left_alone(wrong_after):
    target = tiny_target()
    plain = plain_generate(target, PROMPTS, max_new_tokens=40)
    texts = [[*prompt, *tokens] for prompt, tokens in zip(PROMPTS, plain.tokens, strict=True)]
    drafter = ScriptedDrafter(texts, wrong_after)
    asked = []
    begin = drafter.begin

    class Counted:
        def __init__(self, session):
            self.__dict__.update(session=session)

        def __getattr__(self, name):
            return getattr(self.session, name)

        def propose(self, root, nodes, min_probability):
            asked.append(nodes)
            return self.session.propose(root, nodes, min_probability)

    drafter.begin = lambda *args: Counted(begin(*args))
    budget = Budget(times(), 4)
    found = generate(target, drafter, PROMPTS, max_new_tokens=40, budget=budget)
    assert found.tokens == plain.tokens
    if wrong_after == 0:
        assert len(asked) <= 12
    if wrong_after == 4:
        assert len(asked) >= 0.8 * found.stats.steps / 2


def test_a_resting_drafter_catches_up():
    """A session that took text in at once drafts what one that took it in as it came does."""
    target = tiny_target()
    drafter = tiny_drafter(target)
    text = plain_generate(target, PROMPTS[:1], max_new_tokens=9).tokens[0]
    state = prefill(target, [PROMPTS[0] + text], drafter.feature_layers)
    start, end = len(PROMPTS[0]), state.tokens.shape[1]
    lazy, eager = (drafter.begin(target.embed, target.head, 1) for _ in range(2))
    with torch.inference_mode():
        for session in (lazy, eager):
            session.extend(state.tokens[:, :start], state.features[:, :start], torch.tensor([start]))
            for i in range(start, end):
                session.extend(state.tokens[:, i : i + 1], state.features[:, i : i + 1], torch.tensor([1]))
                if session is eager:
                    session.catch_up()
        assert len(lazy.pending) == 1 + end - start
        first, second = (session.propose(torch.tensor([7]), 6, 0.0) for session in (lazy, eager))
    assert torch.equal(first.tokens, second.tokens)
    torch.testing.assert_close(first.scores, second.scores)
    assert lazy.pending == []


def test_a_real_drafter_under_a_budget_with_rows_that_leave():
    target = tiny_target()
    drafter = tiny_drafter(target)
    plain = plain_generate(target, PROMPTS, max_new_tokens=30, eos=(7, 11))
    for cheap in (times(whole=(4.1, 4.2, 4.3)), times(draft=9.0, whole=(20.0, 21.0, 22.0))):
        found = generate(target, drafter, PROMPTS, max_new_tokens=30, eos=(7, 11), budget=Budget(cheap, 4))
        assert found.tokens == plain.tokens


def test_measured_once(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "ctc_drafter")
    monkeypatch.setenv("CTC_DRAFTER_CACHE", str(tmp_path))
    target = tiny_target()
    drafter = tiny_drafter(target)
    first = step_times(target, drafter, nodes=2, rows=2)
    assert (first.batches, first.sizes) == ((1, 2), (1, 2))
    assert all(0 < value < math.inf for line in first.plain for value in line)
    (file,) = tmp_path.iterdir()
    said = ["measuring step times, once for this target, drafter and machine ..."]
    assert caplog.messages == said, "a wait is no silent one"
    monkeypatch.setattr("ctc_drafter.decode.profile.measure", None)
    assert step_times(target, drafter, nodes=2, rows=2) == first
    assert caplog.messages == said
    file.write_text("{")
    monkeypatch.setattr("ctc_drafter.decode.profile.measure", lambda *_args, **_more: first)
    assert step_times(target, drafter, nodes=2, rows=2) == first
    assert file.read_text() != "{"


def test_measures_fit_into_the_context():
    """Of 128 tokens: three rounds of a plain step and trees of 1 and 2 nodes, 6 tokens at most, and the first token."""
    target = tiny_target()
    assert measure(target, tiny_drafter(target), batches=(1,), sizes=(1, 2)).contexts == (64, 128 - 3 * 6 - 1)


def test_copies_go_on_while_the_network_rests(monkeypatch):
    """Drafting never pays by these times; a text that runs in a circle is still copied, for nothing."""
    target = tiny_target()
    for name, weight in target.model.named_parameters():
        if "o_proj" in name or "down_proj" in name:  # the next token then follows from the newest alone
            weight.data.zero_()
    monkeypatch.setattr(budget_file, "REST", 64)
    drafter = tiny_drafter(target, copies=4, lookup_length=8)
    plain = plain_generate(target, PROMPTS[:1], max_new_tokens=60)
    dear = Budget(times(draft=9.0, whole=(13.2, 13.3, 13.4)), 4)
    options = {"max_new_tokens": 60, "budget": dear, "nodes": 4}
    found, rested = (generate(target, each, PROMPTS[:1], **options) for each in (drafter, network_of(drafter)))
    assert found.tokens == rested.tokens == plain.tokens
    assert found.stats.steps < 0.7 * rested.stats.steps
