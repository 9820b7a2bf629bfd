"""Best-first CTC prefix search on a CPU (numba)."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numba import njit

from ctc_drafter.ctc.copies import Text
from ctc_drafter.ctc.kernels_cpu import add_bfloat16, combine, dot, exp
from ctc_drafter.ctc.lattice import sum_floor
from ctc_drafter.types import Candidates

# Best-first prefix search on a CPU: exactly the n most probable prefixes of each row, in one compiled call.
#
# A prefix is never more probable than the prefix it extends. So prefixes can be settled in the order of their
# probability, as in Dijkstra's algorithm, and n expansions find the n best, whatever the depth of the tree.
# `search.py` finds the same prefixes level by level with static shapes, which suits a GPU, and expands n a level.
#
# For a prefix with last token y, at frame t (P depends on the prefix, as in `lattice.py`):
#
#     n(t), b(t)    it is complete and frame t holds y, or a blank
#     n(t) = arrives(t) + n(t-1) P(y | t),  b(t) = (b(t-1) + n(t-1)) P(blank | t)
#     child v != y  sum over t of (b(t-1) + n(t-1)) P(v | t); child y: sum over t of b(t-1) P(y | t)
#
# and a child's arrives(t) is its parent's term of that sum. The root has b = 1 before the first frame and no n.
#
# Worked example: frames (a .5, b .2, blank .3) and (a .1, b .6, blank .3), the three best prefixes. The root's
# children are a .53 and b .38. First a is settled, and gives ab .3; then b, and its child ba .02 comes too late.


class LowRankBias(NamedTuple):
    """Low-rank bias that a prefix adds to the logit of column v, for T tokens, V columns, rank r and width M:

    `output[:, v] @ (scale * (table[last] + inner @ silu(earlier[previous] + later[last] + root)))`, without `earlier`
    right after the root. table `[T, r]`, inner `[r, M]`, scale `[r]`: float32. earlier and later `[T, M]`: bfloat16 as
    uint16 (`kernels_cpu.bfloat16_bits`), half the memory of a table for every token. output `[r, V]`: int8, which is
    read in half the time of float32. r = 0 for no bias.

    What the prefix copies (`copies.py`) gets `copying[l] @ silu(..) + trust[l]` more, for the length l + 1 of the copy.
    copying `[longest, M]`, trust `[longest]`: float32, none to copy nothing. columns `int64 [T]`: each token's column.
    """

    table: np.ndarray
    earlier: np.ndarray
    later: np.ndarray
    inner: np.ndarray
    scale: np.ndarray
    output: np.ndarray
    copying: np.ndarray = np.zeros((0, 0), np.float32)
    trust: np.ndarray = np.zeros(0, np.float32)
    columns: np.ndarray = np.zeros(0, np.int64)


class FrameTerms(NamedTuple):
    """Joint terms (`joint.py`) of the columns `int64 [B, F, K]` of each frame: after a prefix whose hidden layer in
    `LowRankBias` is h, `tokens[b, f, k] @ silu(frames[b, f] + prefix @ h)`.

    tokens `[B, F, K, J]`, frames `[B, F, J]`, prefix `[J, M]`: float32. K = 0 for no terms.
    """

    columns: np.ndarray
    tokens: np.ndarray
    frames: np.ndarray
    prefix: np.ndarray


def no_terms(rows: int) -> FrameTerms:
    """Those of frames without any."""
    empty = np.zeros((rows, 0, 0), np.float32)
    return FrameTerms(empty.astype(np.int64), np.zeros((rows, 0, 0, 0), np.float32), empty, empty[0])


class Pool(NamedTuple):
    """The root and the prefixes found so far, most probable first; an entry is final once its turn has come.

    last: newest token; column: its place in the frames' logits. strength: exp(bias) of it after its parent, scaled.
    blank and token `[N, F]`: b(t-1) and n(t-1) over the normaliser of frame t, of expanded entries.
    joint `[N, F, K]`: weights of each frame's columns that have joint terms after an expanded entry, scaled alike.
    """

    last: np.ndarray
    column: np.ndarray
    parent: np.ndarray
    depth: np.ndarray
    score: np.ndarray
    strength: np.ndarray
    blank: np.ndarray
    token: np.ndarray
    joint: np.ndarray


def best_prefixes(
    frame_logits: torch.Tensor,
    blank_logits: torch.Tensor,
    root: torch.Tensor,
    bias: LowRankBias,
    root_states: torch.Tensor,
    *,
    count: int,
    depth: int,
    min_probability: float = 0.0,
    vocabulary: torch.Tensor | None = None,
    text: Text | None = None,
    joint: FrameTerms | None = None,
) -> Candidates:
    """The `count` most probable prefixes of up to `depth` tokens with probability `min_probability` or more, best
    first.

    frame_logits `[B, F, V]`, blank_logits `[B, F]`, root `int64 [B]`, root_states `[B, M]` (`root` in
    `LowRankBias`), float32 on the CPU. vocabulary `int64 [V]`: the token of each column, where frames know only some.
    text: what may be copied; the bias says whether. Rows that have fewer prefixes are padded with score -inf.
    """
    if vocabulary is None:
        vocabulary = torch.arange(frame_logits.shape[2])
    if text is None:
        text = Text(root.unsqueeze(1), torch.zeros_like(root))
    top = torch.maximum(frame_logits.amax(-1), blank_logits).unsqueeze(-1)
    weights, blank = (frame_logits - top).exp_().contiguous(), (blank_logits - top[..., 0]).exp_().contiguous()
    tiny = np.float32(sum_floor(torch.float32))
    arrays = _search_rows(
        weights.numpy(),
        blank.numpy(),
        # Numba compiles anew, for seconds, for arrays with gaps.
        root.contiguous().numpy(),
        vocabulary.contiguous().numpy(),
        bias,
        root_states.contiguous().numpy(),
        text.tokens.contiguous().numpy(),
        text.ends.contiguous().numpy(),
        no_terms(len(root)) if joint is None else joint,
        count,
        depth,
        min_probability,
        tiny,
    )
    tokens, parents, depths, scores = map(torch.from_numpy, arrays)
    return Candidates(tokens, parents, depths, scores.log_())


# Compiled from here on. Weights are exp(logit), scaled so that a frame's best symbol has 1. Loops in place of array
# expressions and slices: the first draft on a machine waits for the compiler, which takes twice as long for those.


@njit(cache=True, nogil=True)
def _search_rows(  # type: ignore[no-untyped-def]
    weights, blank, roots, vocabulary, bias, states, texts, ends, terms, count, depth, min_probability, tiny
):
    rows, longest = len(roots), 0
    tokens, parents, depths, scores = _new_candidates(rows, count)
    for row in range(rows):
        pool = _new_pool(1 + count, weights.shape[1], roots[row], terms.columns.shape[2])
        own = FrameTerms(terms.columns[row], terms.tokens[row], terms.frames[row], terms.prefix)
        text = texts[row, : ends[row] + 1]
        found = (
            _search(
                weights[row], blank[row], vocabulary, pool, bias, states[row], text, own, depth, min_probability, tiny
            )
            - 1
        )
        _take(pool, found, tokens[row], parents[row], depths[row], scores[row])
        longest = max(longest, found)
    return tokens[:, :longest], parents[:, :longest], depths[:, :longest], scores[:, :longest]


@njit(cache=True, nogil=True)
def _new_candidates(rows, count):  # type: ignore[no-untyped-def]
    tokens, parents = np.zeros((rows, count), np.int64), np.full((rows, count), -1, np.int64)
    return tokens, parents, np.ones((rows, count), np.int64), np.zeros((rows, count), np.float32)


@njit(cache=True, nogil=True)
def _take(pool, found, tokens, parents, depths, scores):  # type: ignore[no-untyped-def]
    """Copies the entries behind the root to one row of candidates."""
    for i in range(found):
        tokens[i], parents[i] = pool.last[i + 1], pool.parent[i + 1] - 1
        depths[i], scores[i] = pool.depth[i + 1], pool.score[i + 1]


@njit(cache=True, nogil=True)
def _new_pool(places, frames, root, terms):  # type: ignore[no-untyped-def]
    whole, real = np.zeros((4, places), np.int64), np.zeros((2, places), np.float32)
    masses = np.zeros((2, places, frames), np.float32)
    joint = np.zeros((places, frames, terms), np.float32)
    pool = Pool(whole[0], whole[1], whole[2], whole[3], real[0], real[1], masses[0], masses[1], joint)
    pool.last[0], pool.score[0] = root, 1
    return pool


@njit(cache=True, nogil=True)
def _search(  # type: ignore[no-untyped-def]
    weights, blank, vocabulary, pool, bias, root_state, text, terms, depth, min_probability, tiny
):
    """Expands entries in their order; returns how many there are in the end."""
    found = np.int64(1)  # no literal, for which all that is called would be compiled once more
    others = _without(weights, terms)
    for i in range(len(pool.last) - 1):  # no room would be left for children of the last one
        if i == found:
            break
        if pool.depth[i] < depth:
            hidden = _hidden(pool, i, bias, root_state)
            strength, shift = _strength(pool, i, bias, hidden, text, weights.shape[1])
            _fill_joint(weights, pool, i, strength, terms, hidden)
            normaliser = np.empty_like(blank)
            for t in range(len(blank)):
                total = dot(others[t], strength)
                for each in pool.joint[i, t]:
                    total += each
                normaliser[t] = max(total, tiny) + blank[t] * shift
            repeat = _stand(others, blank, pool, i, strength, shift, normaliser, terms)
            found = _offer(others, vocabulary, pool, found, i, strength, repeat, terms, min_probability)
    return found


@njit(cache=True, nogil=True)
def _hidden(pool, i, bias, root_state):  # type: ignore[no-untyped-def]
    """The predictor's hidden layer after entry i, `[M]`."""
    last = pool.last[i]
    hidden = np.empty(bias.inner.shape[1], np.float32)
    if len(hidden) == 0:
        return hidden
    for m in range(len(hidden)):
        hidden[m] = root_state[m]
    add_bfloat16(hidden, bias.later[last])
    if i > 0:
        add_bfloat16(hidden, bias.earlier[pool.last[pool.parent[i]]])
    for m in range(len(hidden)):
        hidden[m] /= 1 + math.exp(-hidden[m])
    return hidden


@njit(cache=True, nogil=True)
def _without(weights, terms):  # type: ignore[no-untyped-def]
    """Weights of all columns but those with joint terms, which are 0."""
    if terms.columns.shape[1] == 0:
        return weights
    others = weights.copy()
    for t in range(len(others)):
        for column in terms.columns[t]:
            others[t, column] = 0
    return others


@njit(cache=True, nogil=True)
def _fill_joint(weights, pool, i, strength, terms, hidden):  # type: ignore[no-untyped-def]
    """Fills entry i's `joint`."""
    if pool.joint.shape[2] == 0:
        return
    rank = len(terms.prefix)
    after, mixed = np.empty(rank, np.float32), np.empty(rank, np.float32)
    for j in range(rank):
        after[j] = dot(terms.prefix[j], hidden)
    for t in range(pool.joint.shape[1]):
        for j in range(rank):
            mixed[j] = after[j] + terms.frames[t, j]
            mixed[j] /= 1 + math.exp(-mixed[j])
        for k in range(pool.joint.shape[2]):
            column = terms.columns[t, k]
            pool.joint[i, t, k] = weights[t, column] * strength[column] * math.exp(dot(terms.tokens[t, k], mixed))


@njit(cache=True, nogil=True)
def _weight(others, pool, i, t, strength, terms, column):  # type: ignore[no-untyped-def]
    """A column's weight in frame t after entry i, times its strength there."""
    for k in range(pool.joint.shape[2]):
        if terms.columns[t, k] == column:
            return pool.joint[i, t, k]
    return others[t, column] * strength


@njit(cache=True, nogil=True)
def _strength(pool, i, bias, inner, text, columns):  # type: ignore[no-untyped-def]
    """exp(bias - s) of every column after entry i, `[V]`, and exp(-s); s: the largest bias, at least 0. inner: the
    predictor's hidden layer."""
    rank = len(bias.inner)
    if rank == 0:
        return np.ones(columns, np.float32), np.float32(1)
    last = pool.last[i]
    state = np.empty(rank, np.float32)
    for r in range(rank):
        state[r] = bias.scale[r] * (bias.table[last, r] + dot(bias.inner[r], inner))
    strength = combine(state, bias.output)
    if len(bias.trust) > 0:
        token, length = copied_after(pool, i, text, len(bias.trust))
        if length > 0 and bias.columns[token] >= 0:
            strength[bias.columns[token]] += dot(bias.copying[length - 1], inner) + bias.trust[length - 1]
    largest = np.float32(0)
    for each in strength:
        largest = max(largest, each)
    exp(strength, largest)
    return strength, np.float32(math.exp(-largest))


@njit(cache=True, nogil=True)
def copied_after(pool, i, text, longest):  # type: ignore[no-untyped-def]
    """What entry i copies from the text, which ends with the root, and its length; see `copies.py`."""
    newest, known = np.empty(longest, np.int64), 0
    while i > 0 and known < longest:
        newest[known] = pool.last[i]
        known, i = known + 1, pool.parent[i]
    for token in text[::-1][: longest - known]:
        newest[known] = token
        known += 1
    best, copied = 0, -1
    for place in range(len(text) - 2, -1, -1):  # what follows it is the copy
        length = 0
        while length < known and length <= place and text[place - length] == newest[length]:
            length += 1
        if length > best:
            best, copied = length, text[place + 1]
            if best == longest:
                break
    return copied, best


@njit(cache=True, nogil=True)
def _stand(others, blank, pool, i, strength, shift, normaliser, terms):  # type: ignore[no-untyped-def]
    """Fills entry i's `blank` and `token`; returns the score of the child that repeats its last token."""
    parent, last = pool.parent[i], pool.column[i]
    repeats = parent > 0 and pool.column[parent] == last
    after_blank, after_token, repeat = 1.0 if i == 0 else 0.0, 0.0, 0.0
    for t in range(len(normaliser)):
        pool.blank[i, t], pool.token[i, t] = after_blank / normaliser[t], after_token / normaliser[t]
        arrives = stay = 0.0
        if i > 0:
            before = pool.blank[parent, t] + (0.0 if repeats else pool.token[parent, t])
            arrives = before * _weight(others, pool, parent, t, pool.strength[i], terms, last)
            stay = _weight(others, pool, i, t, strength[last], terms, last) / normaliser[t]
        repeat += after_blank * stay
        after_blank = (after_blank + after_token) * blank[t] * shift / normaliser[t]
        after_token = arrives + after_token * stay
    return repeat


@njit(cache=True, nogil=True)
def _offer(others, vocabulary, pool, found, i, strength, repeat, terms, min_probability):  # type: ignore[no-untyped-def]
    """Gives entry i's children places in the pool's order, where they earn one; returns how many entries it has."""
    places, mass = len(pool.last), np.empty(len(others), np.float32)
    for t in range(len(mass)):
        mass[t] = pool.blank[i, t] + pool.token[i, t]
    scores = combine(mass, others)
    for v in range(len(scores)):
        scores[v] *= strength[v]
    for t in range(len(mass)):
        for k in range(pool.joint.shape[2]):
            scores[terms.columns[t, k]] += mass[t] * pool.joint[i, t, k]
    if i > 0:
        scores[pool.column[i]] = repeat
    least = pool.score[places - 1] if found == places else np.float32(0)
    for v in range(len(scores)):
        if scores[v] > least and scores[v] >= min_probability:
            score = min(scores[v], pool.score[i])  # rounding must not lift a child above its parent
            j = min(found, places - 1)
            while pool.score[j - 1] < score:
                pool.last[j], pool.parent[j], pool.depth[j] = pool.last[j - 1], pool.parent[j - 1], pool.depth[j - 1]
                pool.score[j], pool.strength[j] = pool.score[j - 1], pool.strength[j - 1]
                pool.column[j] = pool.column[j - 1]
                j -= 1
            pool.last[j], pool.parent[j], pool.depth[j] = vocabulary[v], i, pool.depth[i] + 1
            pool.score[j], pool.strength[j], pool.column[j] = score, strength[v], v
            found = min(found + 1, places)
            least = pool.score[places - 1] if found == places else np.float32(0)
    return found
