"""Training objective: anchors in a text, their labels, and the loss in chunks.

Shape letters: B rows, T tokens, A anchors of a row, N anchors of a batch, U labels, F frames, H hidden size.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ctc_drafter.drafters.lm_head import head_logits
from ctc_drafter.drafters.trainable import Objective, TrainableDrafter

# Fewer leave kernels idle, more only cost memory: of a vocabulary of 8,192 it holds 512 anchors, of 128k 32.
LOGITS_AT_A_TIME = 2**28


@dataclass(frozen=True)
class Anchors:
    """positions: int64 [B, A], index of each root. used: bool [B, A], false for padding.

    prefixes: int64 [B, A, 1+U], the root and the tokens after it. valid: bool [B, A, U], label within the text.
    """

    positions: torch.Tensor
    used: torch.Tensor
    prefixes: torch.Tensor
    valid: torch.Tensor


def anchor_counts(lengths: torch.Tensor, answer_start: torch.Tensor, anchors: int) -> torch.Tensor:
    """Anchors that each row has room for, at most `anchors`: `int64 [B]`."""
    return (lengths - answer_start).clamp(0, anchors)


def draw_anchors(
    lengths: torch.Tensor, answer_start: torch.Tensor, keys: torch.Tensor, anchors: int, seed: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions `int64 [B, A]` and `used bool [B, A]`: a uniform draw without replacement in each row.

    A root is the last prompt token or an answer token, and at least one token follows it. The draw depends on
    `seed` and the row's key only: not on its batch, the number of processes, or global random state.
    """
    counts = anchor_counts(lengths, answer_start, anchors).tolist()
    rows = []
    rooms = (lengths - answer_start).tolist()
    for count, room, start, key in zip(counts, rooms, answer_start.tolist(), keys.tolist(), strict=True):
        mixed = int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") >> 1
        drawn = torch.randperm(max(room, 0), generator=torch.Generator().manual_seed(mixed))[:count]
        rows.append(drawn.sort().values + start - 1)
    positions = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    if not positions.shape[1]:  # rows without room: drafters want a position to look at
        positions = positions.new_zeros(len(rows), 1)
    used = torch.arange(positions.shape[1]) < torch.tensor(counts).unsqueeze(1)
    return positions.to(lengths.device), used.to(lengths.device)


def label_anchors(
    tokens: torch.Tensor, lengths: torch.Tensor, positions: torch.Tensor, used: torch.Tensor, draft_length: int
) -> Anchors:
    """The next U = `draft_length` tokens of right-padded rows `int64 [B, T]` after each position."""
    steps = torch.arange(draft_length + 1, device=tokens.device)
    index = positions.unsqueeze(-1) + steps
    inside = index < lengths.view(-1, 1, 1)
    flat = index.clamp(max=tokens.shape[1] - 1).flatten(1)
    prefixes = tokens.gather(1, flat).view_as(index)
    return Anchors(positions, used, prefixes, inside[..., 1:] & used.unsqueeze(-1))


def draft_loss(
    drafter: TrainableDrafter,
    embed: nn.Module,
    head: nn.Module,
    features: torch.Tensor,
    tokens: torch.Tensor,
    anchors: Anchors,
    objective: Objective,
    chunk: int | None = None,
    last: torch.Tensor | None = None,
    recompute: bool = False,
    copy_dropout: float = 0.0,
) -> torch.Tensor:
    """Sum of the loss over all used anchors, a scalar in float32. A share `copy_dropout` of them copies nothing.

    last `[B, T, H]`, for the teacher loss: what the target's LM head reads after each token. Its probabilities then
    teach what follows root, y1, .. y(U-1).

    What is as large as the vocabulary exists for `chunk` anchors at a time, by default for `usual_chunk`, and is
    computed again in the backward pass. With `recompute` so are the draft layers.
    """
    if recompute:
        found = checkpoint(drafter.blocks, features, tokens, anchors.positions, embed, use_reentrant=False)
    else:
        found = drafter.blocks(features, tokens, anchors.positions, embed)
    blocks = found[anchors.used]  # [N, ...]
    prefixes, valid = anchors.prefixes[anchors.used], anchors.valid[anchors.used]
    states = blocks.new_empty(len(blocks), 0) if last is None else states_after(last, anchors)[anchors.used]
    copies = drafter.copies(tokens, anchors.positions)[anchors.used]
    copies = dropped(copies, anchors.positions[anchors.used], copy_dropout) if copy_dropout else copies
    return chunked_losses(drafter, embed, head, (blocks, prefixes, valid, states, copies), objective, chunk)


def dropped(copies: torch.Tensor, positions: torch.Tensor, share: float) -> torch.Tensor:
    """Copies `int64 [N, 1+U, 2]` without those of a share of the anchors: length 0. Anchors' places `int64 [N]` alone
    say whose (Knuth's multiplicative hash), so that a resumed run drops the same ones."""
    drop = positions * 2654435761 % 2**32 < share * 2**32
    return copies.masked_fill(drop.view(-1, *[1] * (copies.dim() - 1)), 0)


def chunked_losses(
    drafter: TrainableDrafter,
    embed: nn.Module,
    head: nn.Module,
    wholes: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    objective: Objective,
    chunk: int | None = None,
) -> torch.Tensor:
    """Sum of the loss of N anchors, a scalar in float32, `chunk` of them at a time.

    wholes: block outputs `[N, ...]`, prefixes `int64 [N, 1+U]`, valid `bool [N, U]`, the target's states `[N, U, H]`
    for the teacher loss, `[N, 0]` for others, and copies `int64 [N, ...]`.
    """
    if not len(wholes[0]):
        return wholes[0].sum()  # 0, and still a part of the graph
    taught = wholes[3].shape[-1] > 0
    chunk = chunk or usual_chunk(drafter.config.vocab_size, drafter.config.draft_length)

    def part(
        blocks: torch.Tensor, prefixes: torch.Tensor, valid: torch.Tensor, states: torch.Tensor, copies: torch.Tensor
    ) -> torch.Tensor:
        teacher = probabilities(head, states) if taught else None
        return drafter.losses(blocks, prefixes, valid, embed, head, objective, teacher, copies).sum()

    chunks = list(zip(*(whole.split(chunk) for whole in wholes), strict=True))
    if len(chunks) == 1:
        return part(*chunks[0])
    parts = [checkpoint(part, *each, use_reentrant=False, preserve_rng_state=False) for each in chunks]
    return torch.stack(parts).sum()


def usual_chunk(vocab_size: int, draft_length: int) -> int:
    """Anchors whose logits and biases, a row of each for every label, take some `LOGITS_AT_A_TIME` bytes."""
    return max(1, LOGITS_AT_A_TIME // (4 * vocab_size * 2 * (draft_length + 1)))


def states_after(states: torch.Tensor, anchors: Anchors) -> torch.Tensor:
    """States `[B, A, U, H]` of each anchor's root and y1..y(U-1), of states `[B, T, H]`; clamped at the end."""
    steps = torch.arange(anchors.valid.shape[2], device=states.device)
    index = (anchors.positions.unsqueeze(-1) + steps).clamp(max=states.shape[1] - 1).flatten(1)
    found = states.gather(1, index.unsqueeze(-1).expand(-1, -1, states.shape[2]))
    return found.unflatten(1, anchors.valid.shape[1:])


@torch.no_grad()
def probabilities(head: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """The target's, float32 `[N, U, V]`, of what its LM head reads `[N, U, H]`."""
    return head_logits(head, states.flatten(0, 1)).softmax(-1).unflatten(0, states.shape[:2])
