"""Offline acceptance on held-out answers, without decoding."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch

from ctc_drafter.decode.tree import best_chain, build_tree
from ctc_drafter.drafters.trainable import TrainableDrafter
from ctc_drafter.target.model import Target
from ctc_drafter.train.data import DistilledDataset, collate
from ctc_drafter.train.objective import label_anchors
from ctc_drafter.types import Candidates, TokenTree, UserError

TOP = (1, 5, 10)
UNRANKED = 1 << 30


@torch.inference_mode()
def offline_beta(
    target: Target,
    drafter: TrainableDrafter,
    rows: DistilledDataset,
    *,
    nodes: Sequence[int] = (8, 16, 32, 64),
    max_positions: int = 1024,
    max_rows: int = 64,
    batch_size: int = 8,
    chunk: int = 128,
    seed: int = 0,
) -> dict[str, float]:
    """β on rows that the target wrote greedily, over places drawn uniformly: more than decoding has, which takes a long
    step once where this sees it from each of its places (`docs/log.md`, 2026-11-29). Keys `beta_chain` and one per tree
    size, e.g. `beta_16`.

    With them `top_1`, `top_5` and `top_10`: of the places of the text whose tokens before were all drafted, the share
    whose token is among the drafter's 1, 5, 10 likeliest candidates there.

    At `max_positions` answer positions of `max_rows` rows, both drawn with `seed`, the drafter's tree is laid
    over the text that follows: the longest path that agrees, and one for the bonus token. Positions with fewer
    tokens after them than the drafter drafts are left out. `chunk` positions are searched at a time. Raises
    `UserError` if no position is left.
    """
    device, training = target.device, drafter.training
    drafter.eval()
    totals: dict[str, float] = {}
    ranks: list[torch.Tensor] = []
    count = 0
    heads = drafter.prepared(target.embed, target.head)
    for batch, positions in position_batches(
        rows, draft_positions(rows, drafter, max_positions, max_rows, seed), batch_size
    ):
        tokens, lengths = batch["input_ids"].to(device), batch["lengths"].to(device)
        places = torch.nn.utils.rnn.pad_sequence([torch.tensor(p) for p in positions], batch_first=True)
        used = torch.arange(places.shape[1]) < torch.tensor([[len(p)] for p in positions])
        places, used = places.to(device), used.to(device)
        anchors = label_anchors(tokens, lengths, places, used, drafter.config.draft_length)
        features = target.hidden_features(tokens, drafter.feature_layers)
        found = drafter.drafts(features, tokens, places, used, heads, max(nodes), chunk)
        for candidates, truth in zip(found, anchors.prefixes[used].split(chunk), strict=True):
            for name, accepted in accepted_lengths(candidates, truth, nodes).items():
                totals[name] = totals.get(name, 0.0) + float((accepted + 1).sum())
            count += len(truth)
            ranks.append(true_ranks(candidates, truth))
    drafter.train(training)
    beta = {f"beta_{name}": total / count for name, total in totals.items()}
    ranked = torch.cat(ranks)
    return beta | {f"top_{k}": float((ranked < k).float().mean()) for k in TOP}


def accepted_lengths(candidates: Candidates, truth: torch.Tensor, nodes: Sequence[int]) -> dict[str, torch.Tensor]:
    """Accepted tokens `int64 [N]` of the best chain and of the best tree of each size.

    truth: `int64 [N, 1+U]`, the root and the tokens after it, U at least the deepest candidate's depth.
    """
    root, chain = truth[:, 0], best_chain(candidates)
    accepted = {"chain": agreement(build_tree(root, chain, chain.tokens.shape[1]), truth)}
    return accepted | {str(size): agreement(build_tree(root, candidates, size), truth) for size in nodes}


def true_ranks(candidates: Candidates, truth: torch.Tensor) -> torch.Tensor:
    """The rank, 0 for the best, of each true token among the candidates that extend the true prefix, `int64 [M]`.

    It covers the tokens of truth `int64 [N, 1+U]` whose prefix is a candidate; `UNRANKED` for one that is none.
    """
    rows = torch.arange(len(truth), device=truth.device)
    parent = torch.full_like(rows, -1)
    found = []
    for depth in range(1, truth.shape[1]):
        ours = (candidates.parents == parent.unsqueeze(1)) & (candidates.depths == depth)
        ours &= candidates.scores > float("-inf")
        right = ours & (candidates.tokens == truth[:, depth].unsqueeze(1))
        score = candidates.scores.masked_fill(~right, float("-inf")).amax(1, keepdim=True)
        rank = (ours & (candidates.scores > score)).sum(1)
        known = ours.any(1)  # nothing is known of prefixes that the search did not extend
        found.append(torch.where(right.any(1), rank, UNRANKED)[known])
        kept = right.any(1)
        parent, truth = right.float().argmax(1)[kept], truth[kept]
        candidates = candidates.select(kept)
    return torch.cat(found)


def agreement(tree: TokenTree, truth: torch.Tensor) -> torch.Tensor:
    """Depth `int64 [N]` of the longest path whose tokens are those of truth `int64 [N, 1+U]`."""
    right = (tree.tokens == truth.gather(1, tree.depths)) & tree.valid
    whole = (right.unsqueeze(1) | ~tree.ancestors).all(-1)
    return (tree.depths * whole).amax(1)


def draft_positions(
    rows: DistilledDataset, drafter: TrainableDrafter, max_positions: int, max_rows: int, seed: int
) -> list[tuple[int, int]]:
    """(row, position) pairs, sorted, drawn uniformly where an answer token is the root and all labels exist.

    Raises `UserError` if there are none.
    """
    rng = random.Random(seed)
    found = []
    for index in sorted(rng.sample(range(len(rows)), min(max_rows, len(rows)))):
        row = rows.rows[index]
        last = len(row.ids) - drafter.config.draft_length
        found += [(index, position) for position in range(row.answer_start, last)]
    if not found:
        raise UserError(
            f"no held-out answer is longer than the {drafter.config.draft_length} tokens of a draft; hold out more rows"
        )
    return sorted(rng.sample(found, min(max_positions, len(found))))


def position_batches(
    rows: DistilledDataset, pairs: Sequence[tuple[int, int]], size: int
) -> Iterator[tuple[dict[str, torch.Tensor], list[list[int]]]]:
    """Padded rows of like length with the positions asked of each."""
    positions: dict[int, list[int]] = {}
    for index, position in pairs:
        positions.setdefault(index, []).append(position)
    order = sorted(positions, key=lambda index: len(rows.rows[index].ids))
    for at in range(0, len(order), size):
        chosen = order[at : at + size]
        yield collate([rows[index] for index in chosen]), [positions[index] for index in chosen]
