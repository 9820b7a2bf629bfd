"""`nodes="auto"`: step times are measured at first use, in bounded time, and kept; outputs are plain decoding's."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ctc_drafter.decode import profile
from ctc_drafter.decode.batch import DEFAULT_FLOOR, DEFAULT_NODES, Batch, DecodingConfig
from ctc_drafter.decode.budget import StepTimes
from ctc_drafter.decode.generate import generate, generate_many, plain_generate
from ctc_drafter.decode.hf import speculate
from ctc_drafter.decode.profile import CONTEXTS, SECONDS, automatic, measure, measured_again
from ctc_drafter.decode.sampling import Sampled, warpers
from ctc_drafter.drafters.base import NoDrafter
from ctc_drafter.drafters.copying import Copying
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.serve.server import make_engine
from ctc_drafter.speculator import Speculator
from ctc_drafter.target.packed import pack
from helpers import ScriptedDrafter, tiny_drafter, tiny_target

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]]
NEW = 24
SMALL = StepTimes((1, 4), (64,), (1, 4), ((4.0,), (5.0,)), ((0.1,), (0.2,)), (((4.1, 4.3),), ((6.0, 9.0),)))


def by_generate(target, drafter, **options):
    return generate(target, drafter, PROMPTS, max_new_tokens=NEW, **options).tokens


def by_generate_many(target, drafter, **options):
    found = dict(generate_many(target, drafter, PROMPTS, in_flight=3, max_new_tokens=NEW, **options))
    return [found[place] for place in range(len(PROMPTS))]


def by_custom_generate(target, drafter, **options):
    ids, given = torch.tensor(PROMPTS), {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    decode = speculate(drafter, **options)
    return target.model.generate(ids, **given, custom_generate=decode)[:, ids.shape[1] :].tolist()


def by_speculator(target, drafter, **options):
    ids, given = torch.tensor(PROMPTS), {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return Speculator(target, drafter, **options).generate(ids, **given)[:, ids.shape[1] :].tolist()


WAYS = [by_generate, by_generate_many, by_custom_generate, by_speculator]


@pytest.fixture
def counted(monkeypatch):
    """How often step times were measured, without the waiting: the arguments of each call."""
    calls = []

    def measured(target, drafter, **options):
        calls.append(options)
        return SMALL

    monkeypatch.setattr(profile, "measure", measured)
    return calls


@pytest.fixture
def budgets(monkeypatch):
    """The budget of each batch."""
    found, init = [], Batch.__init__

    def told(self, method, clock):
        found.append(method.config.budget)
        init(self, method, clock)

    monkeypatch.setattr(Batch, "__init__", told)
    return found


@pytest.mark.measured
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, {"nodes": "auto"}, {"config": DecodingConfig()}], ids=["", "auto", "config"])
def test_every_way_measures_once_and_keeps_it(way, options, counted, budgets, monkeypatch, caplog):
    target = tiny_target()
    expected, drafter = plain_generate(target, PROMPTS, max_new_tokens=NEW).tokens, tiny_drafter(target)
    budgets.clear()
    caplog.set_level("INFO", "ctc_drafter")
    for _ in range(2):
        assert way(target, drafter, **options) == expected
    (call,) = counted
    assert (call["seconds"], call["batches"], call["sizes"]) == (SECONDS, (1, 4), (1, 2, 4, 8, 16))
    assert {budget.times for budget in budgets} == {SMALL}
    monkeypatch.setattr(profile, "BUDGETS", {})  # another process
    assert way(target, drafter, **options) == expected
    assert len(counted) == 1
    assert caplog.messages == ["measuring step times, once for this target, drafter and machine ..."]


@pytest.mark.measured
def test_a_number_or_a_budget_of_ones_own_measures_nothing(counted, budgets):
    target, drafter = tiny_target(), PromptLookup()
    for way in WAYS:
        budgets.clear()
        way(target, drafter, nodes=5)
        assert budgets == [None]
        way(target, drafter, budget=profile.Budget(SMALL, 4))
        way(target, NoDrafter())
    assert counted == []


@pytest.mark.measured
def test_a_server_measures_for_its_batch_size_before_it_serves(counted):
    target = tiny_target()
    engine = make_engine(target, tiny_drafter(target), batch_size=6, queue=2)
    assert [call["batches"] for call in counted] == [(1, 4, 8)]
    assert engine.batches["draft"].method.config.budget.times == SMALL
    assert next(iter(engine.batches)) == "draft"


@pytest.mark.measured
def test_times_of_more_rows_serve_fewer(counted):
    """So that the last batch of a file, smaller than the others, measures nothing; beyond the largest its times do."""
    target, drafter = tiny_target(), PromptLookup()
    for rows in (9, 16, 13, 3, 1):
        assert automatic(target, drafter, rows).times == SMALL
    assert [call["batches"][-1] for call in counted] == [16]
    automatic(target, drafter, 500)
    automatic(target, drafter, 64)
    assert [call["batches"][-1] for call in counted] == [16, 64]


def test_times_are_those_of_one_target_and_one_drafter():
    target = tiny_target()
    drafters = [
        *(tiny_drafter(target), tiny_drafter(target, frames=6), tiny_drafter(target).bfloat16(), PromptLookup()),
        *(Copying(tiny_drafter(target), 4), Copying(tiny_drafter(target, frames=6), 4)),
    ]
    targets = [tiny_target(), tiny_target(num_hidden_layers=2), tiny_target(dtype=torch.bfloat16), tiny_target()]
    assert pack(targets[3].model)
    keys = [profile.key(target, drafter, [1], [2]) for drafter in drafters]
    keys += [profile.key(each, drafters[0], [1], [2]) for each in targets[1:]]
    keys += [profile.key(target, drafters[0], *axes) for axes in (([2], [2]), ([1], [3]))]
    assert len(set(keys)) == len(keys) == 11
    assert profile.key(targets[0], tiny_drafter(targets[0], seed=3), [1], [2]) == keys[0], "weights take no time"


@pytest.mark.measured
def test_a_drafter_that_fails_is_left_to_decoding(caplog):
    """What breaks a measurement may break drafting as well; that is for decoding to say."""
    target = tiny_target()
    broken = tiny_drafter(target)
    broken.config.to_json_string = lambda: 1 / 0
    for _ in range(2):
        assert automatic(target, broken, 1) is None
    assert [each.message for each in caplog.records if each.levelname == "WARNING"] == [
        f"step times cannot be measured (division by zero); trees have up to {DEFAULT_NODES} nodes"
    ]


@pytest.mark.measured
def test_what_profile_measures_is_used(counted):
    """At length, and for as many rows as it is told."""
    target, drafter = tiny_target(), PromptLookup()
    measured_again(target, drafter, nodes=16, rows=128)
    assert [call["seconds"] for call in counted] == [None]
    assert automatic(target, drafter, 100).times == automatic(target, drafter, 2).times == SMALL
    assert len(counted) == 1


@pytest.mark.measured
@pytest.mark.parametrize("way", WAYS)
def test_what_cannot_be_measured_leaves_trees_of_a_fixed_size_and_one_line(way, monkeypatch, caplog, budgets):
    asked = []

    def fails(*_args, **_options):
        asked.append(1)
        raise torch.OutOfMemoryError("no memory\nat all")

    monkeypatch.setattr(profile, "measure", fails)
    target = tiny_target()
    expected = plain_generate(target, PROMPTS, max_new_tokens=NEW).tokens
    budgets.clear()
    drafter = tiny_drafter(target)
    for _ in range(2):
        assert way(target, drafter) == expected
    assert len(asked) == 1
    assert set(budgets) == {None}
    (line,) = [each.message for each in caplog.records if each.levelname == "WARNING"]
    assert line == f"step times cannot be measured (no memory); trees have up to {DEFAULT_NODES} nodes"


@pytest.mark.measured
def test_a_cache_that_cannot_be_written_breaks_nothing(counted, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CTC_DRAFTER_CACHE", str(tmp_path / "file" / "folder"))
    target = tiny_target()
    assert automatic(target, PromptLookup(), 1).times == automatic(target, PromptLookup(), 1).times == SMALL
    assert len(counted) == 1, "kept in this process"


@pytest.mark.measured
@pytest.mark.parametrize("text", ["", "{", "null", '{"batches": []}'])
def test_a_damaged_file_is_measured_again(text, counted, monkeypatch, tmp_path):
    target = tiny_target()
    automatic(target, PromptLookup(), 1)
    (file,) = (tmp_path / "cache").iterdir()
    right = file.read_text()
    file.write_text(text)
    monkeypatch.setattr(profile, "BUDGETS", {})
    assert automatic(target, PromptLookup(), 1).times == SMALL
    assert len(counted) == 2
    assert file.read_text() == right


@pytest.mark.measured
@pytest.mark.parametrize("seed", [None, 5])
def test_really_measured_times_leave_the_output_alone(seed):
    """The measurement draws no random numbers either."""
    target = tiny_target()
    more = {} if seed is None else {"sampler": Sampled([seed, 6, 7], warpers(temperature=1.0))}
    plain = plain_generate(target, PROMPTS, max_new_tokens=NEW, **more).tokens
    scripts = [[*prompt, *tokens] for prompt, tokens in zip(PROMPTS, plain, strict=True)]
    state = torch.get_rng_state()
    for drafter in (tiny_drafter(target), PromptLookup(), ScriptedDrafter([*scripts, scripts[0]], 3)):
        torch.set_rng_state(state)
        found = by_generate(target, drafter, **more)
        assert found == plain
        assert torch.equal(torch.get_rng_state(), state)
    assert automatic(target, PromptLookup(), 3) is not None


def test_without_step_times_trees_are_those_of_before():
    assert (DecodingConfig().fixed_nodes, DecodingConfig().fixed_floor) == (DEFAULT_NODES, DEFAULT_FLOOR)
    assert (DecodingConfig(3, 0.0).fixed_nodes, DecodingConfig(3, 0.0).fixed_floor) == (3, 0.0)


def test_a_floor_that_is_given_counts_under_a_budget_as_well(budgets):
    """Half of the drafts of a scripted drafter have less than .6, those behind the first token."""
    target = tiny_target()
    plain = plain_generate(target, PROMPTS[:1], max_new_tokens=NEW).tokens
    asked = []
    drafter = ScriptedDrafter([[*PROMPTS[0], *plain[0]]], 4)
    begin = drafter.begin

    def begun(*given):
        session = begin(*given)
        propose = session.propose

        def noted(root, nodes, floor):
            asked.append(floor)
            return propose(root, nodes, floor)

        session.propose = noted
        return session

    drafter.begin = begun
    budget = profile.Budget(replace(SMALL), 4)
    generate(target, drafter, PROMPTS[:1], max_new_tokens=NEW, budget=budget, min_probability=0.6)
    assert set(asked) == {0.6}
    asked.clear()
    generate(target, drafter, PROMPTS[:1], max_new_tokens=NEW, budget=profile.Budget(SMALL, 4))
    assert 0 < max(asked) < 0.1


# How long a measurement takes, by a clock that only steps and prompts move.


class Machine:
    """A step of a row takes `step` seconds and `node` more for each node of the tree; a token of a prompt `token`."""

    def __init__(self, monkeypatch, step=1.0, node=0.1, token=0.0, memory=10**9):
        self.now, self.begun, self.steps = 0.0, [], 0
        self.step, self.node, self.token, self.memory = step, node, token, memory
        monkeypatch.setattr(profile, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(profile, "started", self.start)
        monkeypatch.setattr(profile, "timed_step", self.take)

    def start(self, _method, rows, context, _clock):
        self.begun.append((rows, context))
        if rows * context > self.memory:
            raise torch.OutOfMemoryError("no memory")
        self.now += self.token * rows * context
        return SimpleNamespace(rows=[SimpleNamespace(read=[0] * context) for _ in range(rows)])

    def take(self, batch, _clock):
        self.steps += 1
        batch.trees.asked = True
        seconds = self.step * (1 + 0.1 * (len(batch.rows) - 1)) + self.node * batch.trees.told * len(batch.rows)
        self.now += seconds
        for row in batch.rows:
            row.read.append(0)
        draft = 250 * self.step if batch.trees.told else 0.0
        return dict.fromkeys(profile.STAGES, 0.0) | {"whole": 1e3 * seconds, "draft": draft}


def long_target():
    target = tiny_target(max_position_embeddings=4096)
    assert target.context > max(CONTEXTS) + 500
    return target


def test_a_fast_machine_measures_all_there_is(monkeypatch):
    machine = Machine(monkeypatch, step=0.001, node=0.0001)
    target = long_target()
    times = measure(target, PromptLookup(), batches=(1, 4, 16), sizes=(1, 4), seconds=6.0)
    assert (times.batches, times.contexts) == ((1, 4, 16), CONTEXTS)
    assert machine.steps == 6 * 3 * (profile.WARM + profile.ROUNDS)
    assert [line[1] for line in times.plain] == pytest.approx([1.0, 1.3, 2.5])
    assert times.whole[1][0] == pytest.approx((1.3 + 0.4, 1.3 + 1.6))
    assert {ms for line in times.draft for ms in line} == {0.25}
    assert machine.begun[:3] == [(16, CONTEXTS[0]), (1, CONTEXTS[0]), (4, CONTEXTS[0])]


@pytest.mark.parametrize(
    ("step", "token", "steps", "seconds"),
    [
        # A round of plain, 1, 2, 4, 8 and 16 nodes: 6 steps and 31 nodes.
        (0.02, 0.0005, 160, 6.0),
        (0.1, 0.002, 60, 6.0),
        (1.0, 0.01, 12, 20.0),  # a dozen steps, as short as it can be
    ],
)
def test_a_slow_machine_measures_the_most_important_within_some_seconds(step, token, steps, seconds, monkeypatch):
    machine = Machine(monkeypatch, step=step, node=step / 20, token=token)
    sizes = (1, 2, 4, 8, 16)
    times = measure(long_target(), PromptLookup(), batches=(1, 8), sizes=sizes, seconds=6.0)
    assert machine.begun[0] == (8, CONTEXTS[0])
    assert machine.steps <= steps
    assert 8 in times.batches
    one_round = step * (6 * 1.7 + 31 / 20 * 8)
    assert machine.now <= max(seconds, 2 * one_round + 8 * CONTEXTS[0] * token) + one_round


def test_what_there_is_no_memory_for_is_left_out(monkeypatch):
    machine = Machine(monkeypatch, step=0.001, node=0.0001, memory=4 * CONTEXTS[1])
    times = measure(long_target(), PromptLookup(), batches=(1, 4, 64), sizes=(1, 4), seconds=6.0)
    assert (times.batches, times.contexts) == ((1, 4), CONTEXTS)
    machine.memory = 0
    with pytest.raises(torch.OutOfMemoryError):
        measure(long_target(), PromptLookup(), batches=(1, 4), sizes=(1, 4), seconds=6.0)
    machine.memory = 4 * CONTEXTS[0]
    with pytest.raises(torch.OutOfMemoryError):
        measure(long_target(), PromptLookup(), batches=(1, 4), sizes=(1, 4))


def test_long_texts_without_times_have_those_of_short_ones(monkeypatch):
    Machine(monkeypatch, step=0.001, node=0.0001, memory=4 * CONTEXTS[1])
    times = measure(long_target(), PromptLookup(), batches=(1, 16), sizes=(1,), seconds=6.0)
    assert (times.batches, times.contexts) == ((1, 16), CONTEXTS)
    assert times.plain[1] == pytest.approx((2.5, 2.5))
