"""Plain decoding in a batch that stays full: the same tokens as alone, a cache as wide as its longest row."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from ctc_drafter.decode import batch as drafted
from ctc_drafter.decode import generate as loop
from ctc_drafter.decode import prefill as prefilling
from ctc_drafter.decode.generate import PlainBatch, by_length, generate, plain_generate, plain_generate_many
from ctc_drafter.decode.prefill import prefill, prefill_groups
from ctc_drafter.decode.sampling import ARGMAX, Sampled, gumbel, gumbel_argmax, noise, streams, warpers
from ctc_drafter.decode.sequence import SequenceState
from ctc_drafter.decode.stats import Stopwatch
from ctc_drafter.target.cache import gap_free_order, move
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError
from helpers import tiny_drafter, tiny_target

PROMPTS = [[3 + n % 7, *range(1, 1 + (n * 5) % 13)] for n in range(12)]
NEW = 12
SEEDS = [11 * n + 5 for n in range(len(PROMPTS))]


def alone(target: Target, eos: set[int], seeds: list[int] | None) -> list[list[int]]:
    found = []
    for place, prompt in enumerate(PROMPTS):
        options = {} if seeds is None else {"sampler": Sampled([seeds[place]], warpers(0.9))}
        found += plain_generate(target, [prompt], max_new_tokens=NEW, eos=eos, **options).tokens
    return found


@pytest.mark.sparing(2)
@pytest.mark.parametrize(
    ("seeds", "cache"), [(None, "dynamic"), (SEEDS, "static"), (None, "static"), (SEEDS, "dynamic")]
)
def test_every_row_is_what_it_is_alone(cache, seeds):
    target = Target.wrap(tiny_target().model, cache)
    whole = alone(target, set(), seeds)
    eos = {whole[0][2], whole[3][0], whole[5][7]}  # rows end at different times, one at once
    expected = alone(target, eos, seeds)
    assert len({len(tokens) for tokens in expected}) > 2
    for in_flight in (1, 3, 8, 50):
        options = {} if seeds is None else {"sampler": Sampled(seeds, warpers(0.9))}
        found = dict(
            plain_generate_many(target, iter(PROMPTS), in_flight=in_flight, max_new_tokens=NEW, eos=eos, **options)
        )
        assert [found[place] for place in range(len(PROMPTS))] == expected


def test_rows_enter_when_an_eighth_is_free(monkeypatch):
    target = tiny_target()
    entered, real = [], PlainBatch.admit

    def admit(self, rows):
        entered.append((len(self.rows), len(rows)))
        return real(self, rows)

    monkeypatch.setattr(PlainBatch, "admit", admit)
    whole = plain_generate(target, [[1 + n % 9] * (1 + n % 5) for n in range(60)], max_new_tokens=NEW, eos=()).tokens
    entered.clear()
    options = {"max_new_tokens": NEW, "eos": {tokens[3] for tokens in whole[::7]}, "in_flight": 16}
    found = list(plain_generate_many(target, ([1 + n % 9] * (1 + n % 5) for n in range(60)), **options))
    assert len(found) == 60
    assert entered[0] == (0, 16)
    assert all(there + new == 16 and new >= 2 for there, new in entered[:-1])
    assert len(entered) > 3


@torch.inference_mode()
def test_the_cache_is_as_wide_as_the_longest_row():
    target = tiny_target()
    batch = PlainBatch(target, ARGMAX, Stopwatch(target.device, False))
    rows = [SequenceState(0, [5] * 60, 50), SequenceState(1, [6] * 9, 50), SequenceState(2, [7] * 3, 50)]
    batch.admit(rows)
    room = batch.cache.layers[0].buffers[0].data_ptr()
    batch.step()
    assert batch.cache.get_seq_length() == 61
    batch.keep([1, 2])
    assert [row.index for row in batch.rows] == [2, 1]  # the last one moved, the other stays
    batch.step()
    assert batch.cache.get_seq_length() == 11
    batch.admit([SequenceState(3, [8] * 20, 50)])
    batch.step()
    assert batch.cache.get_seq_length() == 21
    assert batch.lengths.tolist() == [3 + 3, 9 + 3, 20 + 1]
    assert batch.cache.layers[0].buffers[0].data_ptr() == room  # nothing was copied to a new place


@torch.inference_mode()
def test_steps_put_keys_where_a_prefill_has_them_and_move_none(monkeypatch):
    """Ragged rows, one of which leaves: each row's slots hold what a fresh prefill of its text does."""
    target = tiny_target(max_position_embeddings=512)
    monkeypatch.setattr(loop, "compact", None)  # not called
    batch = PlainBatch(target, ARGMAX, Stopwatch(target.device, False))
    rows = [SequenceState(0, [5, 9] * 127, 50), SequenceState(1, [6] * 9, 50), SequenceState(2, [7] * 3, 50)]
    for row, token in zip(rows, batch.admit(rows), strict=True):
        row.tokens.append(token)
    for step in range(12):
        for row, token in zip(batch.rows, batch.step().tokens.tolist(), strict=True):
            row.tokens.append(token)
        if step == 6:
            batch.keep([1, 2])
    for place, row in enumerate(batch.rows):
        fresh = prefill(target, [row.read[:-1]]).cache
        for mine, other in zip(batch.cache.layers, fresh.layers, strict=True):
            for states, expected in ((mine.keys, other.keys), (mine.values, other.values)):
                torch.testing.assert_close(states[place, :, : len(row.read) - 1], expected[0], rtol=1e-4, atol=1e-5)


class Queries(TorchFunctionMode):
    """Collects the shapes of attention's queries."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.shapes.add(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lengths", [(9, 9, 9), (4, 9, 2)])
@torch.inference_mode()
def test_heads_that_share_keys_are_rows_of_one_product_in_plain_steps(lengths):
    """What transformers does under a mask; kernels take each head by itself otherwise, three times as slow."""
    target = tiny_target()
    batch = PlainBatch(target, ARGMAX, Stopwatch(target.device, False))
    batch.admit([SequenceState(n, [5] * length, 50) for n, length in enumerate(lengths)])
    with Queries() as queries:
        batch.step()
    config = target.config
    groups = config.num_attention_heads // config.num_key_value_heads
    assert groups > 1
    assert queries.shapes == {(3, config.num_key_value_heads, groups, config.hidden_size // config.num_attention_heads)}


@torch.inference_mode()
def test_numbers_of_rows_that_left_do_not_spoil_others():
    """NaN in a slot that a mask hides makes NaN all the same, so nothing of an earlier row may be left there."""
    target = tiny_target()
    expected = plain_generate(target, [[4] * 6, [9] * 5], max_new_tokens=8).tokens
    batch = PlainBatch(target, ARGMAX, Stopwatch(target.device, False))
    rows = [SequenceState(0, [4] * 6, 8), SequenceState(1, [6] * 30, 8), SequenceState(2, [6] * 30, 8)]
    for row, token in zip(rows, batch.admit(rows), strict=True):
        row.tokens.append(token)
    for layer in batch.cache.layers:
        for states in layer.buffers:
            states[0, :, 30:] = float("nan")
            states[1:] = float("nan")
    batch.keep([0])
    rows = [rows[0], SequenceState(3, [9] * 5, 8), SequenceState(4, [5] * 40, 8)]
    for row, token in zip(rows[1:], batch.admit(rows[1:]), strict=True):
        row.tokens.append(token)
    while len(rows[0].tokens) < 8:
        for row, token in zip(batch.rows, batch.step().tokens.tolist(), strict=True):
            row.tokens.append(token)
    assert [rows[0].tokens, rows[1].tokens] == expected


def tokens_read(target: Target, prompts: list[list[int]], **options) -> tuple[dict[int, list[int]], int]:
    """Answers, and tokens that the model was given in prefills."""
    read = []
    hook = target.embed.register_forward_hook(lambda _module, inputs, _output: read.append(inputs[0].shape))
    found = dict(plain_generate_many(target, prompts, max_new_tokens=6, eos=(), **options))
    hook.remove()
    return found, sum(rows * tokens for rows, tokens in read if tokens > 1)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_beginning_that_all_rows_share_is_read_once(cache):
    target = Target.wrap(tiny_target(max_position_embeddings=512).model, cache)
    start = [3 + n % 11 for n in range(40)]
    prompts = [[*start, 1 + n, 2, 50 + n] for n in range(6)]
    expected = {n: plain_generate(target, [p], max_new_tokens=6, eos=()).tokens[0] for n, p in enumerate(prompts)}
    found, read = tokens_read(target, prompts, in_flight=3)
    assert found == expected
    assert read == 40 + 6 * 3
    # Others begin otherwise, as the same prompt, or with less of it.
    prompts = [*prompts, start, start, [*start[:30], 9, 9], [*start[:30], 1, 1], [4] * 60]
    expected = {n: plain_generate(target, [p], max_new_tokens=6, eos=()).tokens[0] for n, p in enumerate(prompts)}
    for in_flight in (2, 11):
        assert tokens_read(target, prompts, in_flight=in_flight)[0] == expected


@pytest.mark.parametrize("lengths", [[7, 3, 9, 3, 1], [600, 513, 5]])
def test_the_head_reads_one_column_of_each_row(lengths):
    target = tiny_target(max_position_embeddings=1024)
    prompts = [[(3 * row + n) % 90 + 1 for n in range(length)] for row, length in enumerate(lengths)]
    read = []
    handle = target.head.register_forward_hook(lambda _module, inputs, _output: read.append(inputs[0].shape[:2]))
    together = prefill(target, prompts).logits
    handle.remove()
    assert read == [(len(prompts), 1)] * len(read)
    single = torch.cat([prefill(target, [prompt]).logits for prompt in prompts])
    torch.testing.assert_close(together, single, rtol=1e-4, atol=1e-5)
    assert not target.head._forward_pre_hooks


def test_models_that_compute_all_logits_are_prefilled_as_before(monkeypatch):
    target = tiny_target()
    prompts = [[1, 2, 3], [4], [5, 6]]
    expected = prefill(target, prompts).logits
    monkeypatch.setitem(target.__dict__, "slices_logits", False)
    torch.testing.assert_close(prefill(target, prompts).logits, expected, rtol=1e-4, atol=1e-5)


def test_long_prompts_are_not_padded_with_short_ones():
    def groups(*lengths):
        rows = [SequenceState(n, [1] * length, 1) for n, length in enumerate(lengths)]
        return [[len(row.prompt) for row in group] for group in prefill_groups(rows)]

    assert groups(5, 9, 12, 14) == [[5, 9, 12, 14]]
    assert groups(20, 22, 300, 310, 420) == [[20, 22], [300, 310], [420]] or groups(20, 22, 300, 310, 420) == [
        [20, 22],
        [300, 310, 420],
    ]
    assert groups(*[1500] * 5) == [[1500, 1500], [1500, 1500], [1500]]
    for group in groups(*range(1, 900, 7)):
        padded = max(group) * len(group)
        assert padded - sum(group) <= max(prefilling.PADDING, padded // 4)
        assert padded <= prefilling.LARGEST


def test_drafted_batches_prefill_in_groups_too(monkeypatch):
    """A long prompt does not make the short ones as long; each row's output is plain decoding's."""
    target = tiny_target()
    drafter = tiny_drafter(target)
    prompts = [[3, 1, 4], [1, 5, 9, 2], [6] * 200, [5, 3]]
    expected = plain_generate(target, prompts, max_new_tokens=8, eos=()).tokens
    groups = []

    def noted(target, prompts, *others):
        groups.append([len(prompt) for prompt in prompts])
        return prefill(target, prompts, *others)

    monkeypatch.setattr(drafted, "prefill", noted)
    assert generate(target, drafter, prompts, max_new_tokens=8, eos=(), nodes=4).tokens == expected
    assert groups == [[3, 4], [200], [2]]


def test_rows_of_like_length_come_together(monkeypatch):
    monkeypatch.setattr(loop, "WINDOW", 4)
    rows = [SequenceState(n, [1] * length, 1) for n, length in enumerate([5, 1, 3, 2, 9, 8, 7, 6, 4])]
    read = []
    arriving = by_length(read.append(row) or row for row in rows)
    assert len(next(arriving).prompt) == 1
    assert len(read) == 4  # no more than a window is read ahead
    assert [len(row.prompt) for row in arriving] == [2, 3, 5, 9, 8, 7, 6, 4]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1]], {"in_flight": 0}, "in_flight is 0"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_bad_input_is_named(prompts, options, message):
    with pytest.raises(UserError, match=message):
        list(plain_generate_many(tiny_target(), prompts, **{"max_new_tokens": 4, **options}))


def test_nothing_in_nothing_out():
    assert list(plain_generate_many(tiny_target(), [], max_new_tokens=4)) == []


def test_few_rows_move_when_some_leave():
    assert gap_free_order([0, 2, 3]) == [0, 3, 2]
    assert gap_free_order([0, 1, 2]) == [0, 1, 2]
    assert gap_free_order([3, 4]) == [4, 3]
    assert gap_free_order([]) == []


def test_slots_are_moved_within_a_view():
    torch.manual_seed(0)
    room = torch.randn(3, 2, 9, 4)
    states, before = room[:2, :, :7], room.clone()
    rows, source, goal = torch.tensor([0, 0, 1, 1]), torch.tensor([5, 6, 6, 5]), torch.tensor([0, 3, 2, 1])
    move(states, rows, source, goal)
    expected = before.clone()
    expected[0, :, 0], expected[0, :, 3] = before[0, :, 5], before[0, :, 6]
    expected[1, :, 2], expected[1, :, 1] = before[1, :, 6], before[1, :, 5]
    assert torch.equal(room, expected)


@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0, 30.0, 1e20])
@pytest.mark.parametrize("top", [0, 3])
def test_noise_where_it_may_decide_gives_the_choice_of_noise_everywhere(scale, top):
    """Against the definition: the argmax of all scores plus all noise."""
    torch.manual_seed(1)
    for trial in range(20):
        scores = torch.randn(6, 3000) * scale
        scores[2] = scores[2].round()  # ties
        scores[3, 5:] = float("-inf")
        if top:
            scores = warpers(top_k=top)[0](torch.empty(6, 0), scores)
        seeds, positions = torch.randint(1 << 62, (6,)), torch.randint(500, (6,))
        everywhere = gumbel(seeds, positions, torch.arange(3000))
        expected = (scores + everywhere).argmax(-1)
        found = gumbel_argmax(scores, scores.amax(1), streams(seeds, positions))
        assert found.tolist() == expected.tolist(), trial


def test_loud_tokens_win_from_far_below():
    """A token that lies below the best by more than `NEAR` wins where its noise is large enough."""
    seeds, positions, tokens = torch.arange(400), torch.zeros(400, dtype=torch.long), torch.arange(5_000)
    everywhere = gumbel(seeds, positions, tokens)
    scores = torch.full((400, 5_000), -10.0)
    scores[:, 0] = 0.0
    expected = (scores + everywhere).argmax(-1)
    assert (expected > 0).any()
    assert gumbel_argmax(scores, scores.amax(1), streams(seeds, positions)).tolist() == expected.tolist()


def test_infinite_scores_are_chosen():
    scores = torch.zeros(1, 50)
    scores[0, 7] = float("inf")
    own = streams(torch.tensor([3]), torch.tensor([0]))
    assert gumbel_argmax(scores, scores.amax(1), own).tolist() == [7]
    assert noise(own, torch.tensor([7])).isfinite()
