"""Tokens that the target cannot compute: drafted and never written, or in the padding, they must change no answer."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import LlamaForCausalLM, LogitsProcessorList

from benchmarks.families import family_model
from benchmarks.family_checks import stock_continuations
from ctc_drafter.decode.batch import Batch, DecodingConfig, Method
from ctc_drafter.decode.generate import generate, generate_many, new_rows, plain_generate
from ctc_drafter.decode.sampling import ARGMAX, Greedy, Sampled, warpers
from ctc_drafter.decode.stats import Stopwatch
from ctc_drafter.evaluate import exactness
from ctc_drafter.target.compiled import CompiledTarget
from ctc_drafter.target.model import CACHES, Target
from ctc_drafter.types import Candidates, UserError
from helpers import VOCABULARY, tiny_config, tiny_drafter

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 8, 8, 1], [2, 7], [5, 5, 9, 11]]
LENGTH = 20
VALUES = {"nan": float("nan"), "inf": float("inf"), "1e38": 1e38}


class PoisonDrafter(exactness.ScriptedDrafter):
    """Right drafts of lengths that change, and the poison beside every one of them; `ever` and anon without it."""

    def __init__(self, scripts, wrong_after, poison: int, pause: int = 1, vocab_size: int = VOCABULARY):
        super().__init__(scripts, wrong_after, vocab_size)
        self.poison, self.pause, self.last = poison, pause, None

    def begin(self, embed, head, batch_size):
        return PoisonSession(self, list(range(batch_size)))


class PoisonSession(exactness.ScriptedSession):
    def propose(self, root: torch.Tensor, nodes: int, min_probability: float) -> Candidates:
        found = super().propose(root, nodes, min_probability)
        if self.step % self.drafter.pause:
            return found
        right = torch.zeros_like(found.tokens, dtype=torch.bool)
        for place, row in enumerate(self.rows):
            script = self.drafter.scripts[row][self.lengths[place] + 1 :]
            for node, (token, depth) in enumerate(zip(found.tokens[place], found.depths[place], strict=True)):
                right[place, node] = depth <= len(script) and token == script[depth - 1]
        poisoned = torch.where(right, found.tokens, self.drafter.poison)
        return Candidates(poisoned, found.parents, found.depths, found.scores)


def unused(texts, also=()) -> int:
    return next(token for token in range(1, VOCABULARY) if token not in {*itertools.chain(*texts), *also})


def poisoned(value: float, dtype: torch.dtype = torch.float32, **overrides):
    """A tiny Llama, what it answers before one embedding is spoilt, that token, and the spoilt target's model."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(**overrides)).to(dtype).eval()
    expected = stock_continuations(model, PROMPTS, LENGTH)
    token = unused([*PROMPTS, *expected])
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = value
    assert stock_continuations(model, PROMPTS, LENGTH) == expected
    return model, expected, token


def wrapped(model, cache: str) -> Target:
    return Target(model, cache)  # the trial's own tokens may be the poison


@pytest.mark.sparing(4)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rows", [[0], [1], [0, 1, 2]])
@pytest.mark.parametrize("value", VALUES)
def test_greedy_answers_are_stock_ones(value, rows, cache):
    model, expected, token = poisoned(VALUES[value])
    target, prompts = wrapped(model, cache), [PROMPTS[row] for row in rows]
    texts = [PROMPTS[row] + expected[row] for row in rows]
    for wrong_after, pause, nodes in ((0, 1, 1), ((4, 0, 2), 1, 12), (4, 2, 12), ((1, 3), 3, 5)):
        drafter = PoisonDrafter(texts, wrong_after, token, pause)
        found = generate(target, drafter, prompts, max_new_tokens=LENGTH, nodes=nodes, min_probability=0.0).tokens
        assert found == [expected[row] for row in rows], (wrong_after, pause, nodes)


@pytest.mark.sparing(2)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    ("family", "kernel"), [("GPT-2", "eager"), ("Gemma 3", "sdpa"), ("Mistral, sliding", "eager"), ("Mixtral", "sdpa")]
)
def test_other_architectures(family, kernel, cache):
    model = family_model(family, kernel)
    expected = stock_continuations(model, PROMPTS, LENGTH)
    token = unused([*PROMPTS, *expected])
    ids = torch.tensor([token])
    embed = model.get_input_embeddings()
    embed.register_forward_hook(lambda _m, args, out: out.masked_fill((args[0] == ids).unsqueeze(-1), float("nan")))
    assert stock_continuations(model, PROMPTS, LENGTH) == expected
    texts = [prompt + text for prompt, text in zip(PROMPTS, expected, strict=True)]
    drafter = PoisonDrafter(texts, (2, 0, 4), token, vocab_size=model.config.vocab_size)
    target = wrapped(model, cache)
    found = generate(target, drafter, PROMPTS, max_new_tokens=LENGTH, min_probability=0.0, eos=())
    assert found.tokens == expected


@pytest.mark.sparing
@pytest.mark.parametrize("cache", CACHES)
def test_neighbours_keep_their_drafts(cache):
    """Only the row that drafts poison takes plain steps."""
    model, expected, token = poisoned(float("nan"))
    texts = [prompt + text for prompt, text in zip(PROMPTS, expected, strict=True)]

    class One(PoisonSession):
        def propose(self, root, nodes, min_probability):
            clean = exactness.ScriptedSession.propose(self, root, nodes, min_probability)
            self.step -= 1
            both = super().propose(root, nodes, min_probability)
            mine = torch.tensor([row == 1 for row in self.rows]).unsqueeze(1)
            return Candidates(torch.where(mine, both.tokens, clean.tokens), both.parents, both.depths, both.scores)

    drafter = PoisonDrafter(texts, 4, token)
    drafter.begin = lambda _embed, _head, size: One(drafter, list(range(size)))
    found = generate(wrapped(model, cache), drafter, PROMPTS, max_new_tokens=LENGTH, min_probability=0.0)
    assert found.tokens == expected
    assert max(found.accepted[1]) == 0
    assert min(found.accepted[0][:-1]) == min(found.accepted[2][:-1]) == 4


@pytest.mark.sparing
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rows", [[1], [0, 1, 2]])
def test_sampled_and_processed_answers(rows, cache):
    model, _, _ = poisoned(0.0)
    prompts = [PROMPTS[row] for row in rows]
    samplers = [
        Sampled(7, warpers(temperature=0.9, top_p=0.9)),
        Sampled(7),
        Greedy(warpers(temperature=0.5)),
        Sampled(7, LogitsProcessorList([NoNumbers()])),
    ]
    target = wrapped(model, cache)
    for sampler in samplers:
        options = {"max_new_tokens": LENGTH, "sampler": sampler}
        expected = plain_generate(target, prompts, **options).tokens
        token = unused([*prompts, *expected])
        texts = [prompt + text for prompt, text in zip(prompts, expected, strict=True)]
        with torch.no_grad():
            before = model.model.embed_tokens.weight[token].clone()
            model.model.embed_tokens.weight[token] = float("nan")
        drafter = PoisonDrafter(texts, (4, 0, 2), token)
        assert generate(target, drafter, prompts, min_probability=0.0, **options).tokens == expected
        with torch.no_grad():
            model.model.embed_tokens.weight[token] = before


class NoNumbers:
    """A processor that does not bear what is no number."""

    def __call__(self, input_ids, scores):
        if scores.isnan().any():
            raise ZeroDivisionError("no number")
        return scores


@pytest.mark.sparing
@pytest.mark.parametrize("cache", CACHES)
def test_rows_that_join_and_leave(cache):
    model, expected, token = poisoned(float("nan"))
    texts = [prompt + text for prompt, text in zip(PROMPTS, expected, strict=True)] * 2
    drafter = PoisonDrafter(texts, (4, 0, 2), token, pause=2)
    found = generate_many(
        wrapped(model, cache), drafter, PROMPTS * 2, in_flight=2, max_new_tokens=LENGTH, min_probability=0.0
    )
    assert dict(found) == dict(enumerate(expected * 2))


@pytest.mark.sparing(2)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_token_0_in_padding(value, cache):
    """Prompts of a batch are filled up, and so are smaller trees: neither may read a token that was not given."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config()).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = VALUES[value]
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6, 8, 8, 1], [2, 7], [5, 5, 9, 11]]
    expected = [stock_continuations(model, [prompt], LENGTH)[0] for prompt in prompts]
    assert all(0 not in text for text in expected)
    target = wrapped(model, cache)
    assert plain_generate(target, prompts, max_new_tokens=LENGTH).tokens == expected
    texts = [prompt + text for prompt, text in zip(prompts, expected, strict=True)]
    right = generate(target, Uneven(texts), prompts, max_new_tokens=LENGTH, min_probability=0.1)
    assert right.tokens == expected
    assert right.accepted[1][0] == 0  # nothing was drafted there
    assert max(right.accepted[0]) > 1  # and the padding cost no other row its drafts
    assert max(right.accepted[1]) > 1
    assert (
        generate(target, tiny_drafter(target), prompts, max_new_tokens=LENGTH, min_probability=0.0).tokens == expected
    )


@pytest.mark.slow
def test_compiled_steps():
    """Their fillers are no token 0, and their caches are static."""
    model, expected, token = poisoned(float("nan"))
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = float("nan")
    assert all(0 not in text for text in expected)
    texts = [prompt + text for prompt, text in zip(PROMPTS, expected, strict=True)]
    target = CompiledTarget(model, backend="eager")
    drafter = PoisonDrafter(texts, (4, 0, 2), token, pause=2)
    assert generate(target, drafter, PROMPTS, max_new_tokens=LENGTH, min_probability=0.0).tokens == expected


class Uneven(PoisonDrafter):
    """Drafts for every other row only; the others' prefixes are padding of token 0."""

    def __init__(self, scripts):
        super().__init__(scripts, 4, 0)

    def begin(self, embed, head, batch_size):
        return UnevenSession(self, list(range(batch_size)))


class UnevenSession(exactness.ScriptedSession):
    def propose(self, root, nodes, min_probability):
        found = super().propose(root, nodes, min_probability)
        hidden = torch.tensor([(self.step + row) % 2 == 0 for row in self.rows]).unsqueeze(1)
        scores = found.scores.masked_fill(hidden, float("-inf"))
        return Candidates(found.tokens.masked_fill(hidden, 0), found.parents, found.depths, scores)


@pytest.mark.sparing
@pytest.mark.parametrize("cache", CACHES)
def test_a_target_that_is_broken_itself_is_decoded_as_by_plain_steps(cache):
    """It writes whatever argmax makes of no numbers, and ends; its neighbours do not notice."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config()).eval()
    clean = stock_continuations(model, PROMPTS, LENGTH)
    written = next(t for t in clean[1][3:] if t not in {*itertools.chain(*PROMPTS, clean[0], clean[2], clean[1][:3])})
    with torch.no_grad():
        model.model.embed_tokens.weight[written] = float("nan")
    target = wrapped(model, cache)
    expected = [plain_generate(target, [prompt], max_new_tokens=LENGTH).tokens[0] for prompt in PROMPTS]
    assert expected[0] == clean[0]
    assert expected[1] != clean[1]
    texts = [prompt + text for prompt, text in zip(PROMPTS, clean, strict=True)]
    for good in (4, (0, 2)):
        drafter = PoisonDrafter(texts, good, written)
        found = generate(target, drafter, PROMPTS, max_new_tokens=LENGTH, min_probability=0.0)
        assert found.tokens == expected


def forwards(target: Target, drafter, prompts) -> tuple[int, int]:
    """Forwards of the target, and steps, of a whole decoding."""
    calls = []
    hook = target.model.register_forward_hook(lambda *_: calls.append(1))
    steps = len(generate(target, drafter, prompts, max_new_tokens=LENGTH, min_probability=0.0).accepted[0])
    hook.remove()
    return len(calls) - 1, steps


def test_what_it_costs():
    """Nothing without poison; a second forward with it; one a step once the row's own text is broken."""
    model, expected, token = poisoned(float("nan"))
    texts = [prompt + text for prompt, text in zip(PROMPTS, expected, strict=True)]
    target = wrapped(model, "dynamic")
    assert forwards(target, exactness.ScriptedDrafter(texts, 2, VOCABULARY), PROMPTS[:1])[0] > 0
    clean = PoisonDrafter(texts, 2, texts[0][0])
    count, steps = forwards(target, clean, PROMPTS[:1])
    assert count == steps
    count, steps = forwards(target, PoisonDrafter(texts, 2, token), PROMPTS[:1])
    assert count == 2 * steps
    with torch.no_grad():
        model.model.embed_tokens.weight[expected[0][0]] = float("nan")
    count, steps = forwards(target, PoisonDrafter(texts, 2, token), PROMPTS[:1])
    assert steps < count <= steps + 2


@pytest.mark.sparing
@pytest.mark.parametrize("cache", CACHES)
def test_float16_that_overflows(cache):
    """An embedding near the largest number, which Gemma multiplies."""
    model = family_model("Gemma 3").to(torch.float16)
    expected = stock_continuations(model, PROMPTS, LENGTH)
    token = unused([*PROMPTS, *expected])
    embed = model.get_input_embeddings()
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # no longer tied
        embed.weight[token] = 60_000
        assert not embed(torch.tensor([token])).isfinite().any()
    assert stock_continuations(model, PROMPTS, LENGTH) == expected
    texts = [prompt + text for prompt, text in zip(PROMPTS, expected, strict=True)]
    drafter = PoisonDrafter(texts, (4, 0, 2), token, vocab_size=model.config.vocab_size)
    found = generate(wrapped(model, cache), drafter, PROMPTS, max_new_tokens=LENGTH, min_probability=0.0, eos=())
    assert found.tokens == expected
    assert max(found.accepted[0]) == 0  # poison in each draft: every step was taken again


def test_a_step_that_fails_leaves_a_batch_as_it_was():
    """Cache, lengths, rows and session: the next step gives what it would have given."""
    model, expected, token = poisoned(float("nan"))
    for cache in CACHES:
        target = wrapped(model, cache)
        texts = [prompt + text for prompt, text in zip(PROMPTS, expected, strict=True)]
        drafter = PoisonDrafter(texts, (4, 0, 2), token)
        fails = Failing()
        batch = Batch(Method(target, drafter, DecodingConfig(8, 0.0, fails)), Stopwatch(target.device, False))
        rows = new_rows(target, PROMPTS, LENGTH, ())
        with torch.inference_mode():
            for row, first in zip(rows, batch.admit(rows), strict=True):
                row.tokens.append(first)
            while min(len(row.tokens) for row in rows) < LENGTH:
                fails.on = not fails.on
                before = batch.cache.get_seq_length(), batch.lengths.tolist(), batch.root.tolist()
                if fails.on:
                    with pytest.raises(UserError, match="row 1"):
                        batch.step()
                    assert before == (batch.cache.get_seq_length(), batch.lengths.tolist(), batch.root.tolist())
                    continue
                tokens, counts = batch.step().emitted()
                for row, new, count in zip(rows, tokens, counts, strict=True):
                    row.tokens += new[: count + 1]
        assert [row.tokens[:LENGTH] for row in rows] == expected


class Failing:
    """Argmax, but fails for row 1 while `on`."""

    on = False

    def validate(self, row, logits):
        return

    def sample(self, logits, rows):
        if self.on and any(row.index == 1 for row in rows):
            raise UserError("no")
        return ARGMAX.sample(logits, rows)

    def sample_tree(self, tree, logits, rows):
        self.sample(logits[:, 0], rows)
        return ARGMAX.sample_tree(tree, logits, rows)
