"""CTC head for other engines' DFlash layers: blank head, predictor, search for the best chain."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import nn
from torch.nn.functional import pad

from ctc_drafter.ctc.search import prefix_search
from ctc_drafter.decode.tree import best_chain
from ctc_drafter.drafters.block import Carry
from ctc_drafter.drafters.ctc_session import divided
from ctc_drafter.drafters.joint import JointNetwork, joint_of_prefixes
from ctc_drafter.drafters.predictor import Embed, Predictor
from ctc_drafter.integrations.settings import HeadSettings
from ctc_drafter.types import UserError

Tensors = Iterable[tuple[str, torch.Tensor]]


class CTCHead(nn.Module):
    """Names of its tensors are those of `CTCDrafter`. Shapes are static, and the host is never asked."""

    def __init__(self, settings: HeadSettings):
        super().__init__()
        self.settings = settings
        size = settings.hidden_size
        self.blank_head = nn.Linear(size, 1)
        self.predictor = None
        if settings.predictor_rank:
            sizes = (settings.vocab_size, size, settings.predictor_rank, settings.predictor_width)
            self.predictor = Predictor(*sizes, settings.draft_vocab_size, tied=settings.predictor_tied)
        self.joint = None
        if settings.joint_tokens:
            self.joint = JointNetwork(size, settings.predictor_width, settings.joint_rank, settings.joint_tokens)
        self.rows: torch.Tensor | None = None  # of the predictor's output matrix, once the embedding is known
        carry = size, 1 + settings.frames, settings.carry_rank
        self.carry = Carry(*carry) if settings.carry else None
        self.carry_root = Carry(*carry) if settings.carry_root else None
        if settings.draft_vocab_size:
            self.register_buffer("d2t", torch.zeros(settings.draft_vocab_size, dtype=torch.long))

    @torch.no_grad()
    def take(self, tensors: Tensors) -> list[tuple[str, torch.Tensor]]:
        """Loads its own tensors and returns the others. Raises `UserError` when some are missing."""
        own, others = {}, []
        known = self.state_dict().keys()
        for name, tensor in tensors:
            if name in known:
                own[name] = tensor
            else:
                others.append((name, tensor))
        missing = sorted(known - own.keys())
        if missing:
            raise UserError(f"the draft model has no tensor {missing[0]}; export the drafter again")
        self.load_state_dict(own)
        self.rows = None
        return others

    @torch.no_grad()
    def chains(self, states: torch.Tensor, root: torch.Tensor, logits: torch.Tensor, embed: Embed) -> torch.Tensor:
        """The best chain of each row, `int64 [B, F]`: target ids, filled up with the mask token.

        states `[B, 1+F, H]`: block outputs at the root and at the frames. root `int64 [B]`. logits `[B, F, V]`: the LM
        head's, of the whole vocabulary. embed: the target's embedding, its scale included.
        """
        settings = self.settings
        blanks = self.blank_head(states[:, 1:]).squeeze(-1)
        vocabulary = None
        if settings.draft_vocab_size:
            d2t = cast(torch.Tensor, self.d2t)
            vocabulary = d2t + torch.arange(len(d2t), device=d2t.device)
            logits = logits[..., vocabulary]
        bias, joint, temperature = None, None, settings.score_temperature
        if self.predictor is not None:
            if self.rows is None:
                self.rows = self.predictor.output_rows(embed, vocabulary)
            bias = divided(self.predictor.search_bias(states[:, 0], embed, rows=self.rows), temperature)
            if self.joint is not None:
                made_of = self.predictor, states, logits, self.predictor.drafted(vocabulary), embed, temperature
                joint = joint_of_prefixes(self.joint, *made_of)
        found = prefix_search(
            logits.float() / temperature,
            blanks.float() / temperature,
            root.long(),
            bias,
            width=settings.width,
            depth=settings.draft_length,
            vocabulary=vocabulary,
            joint=joint,
        )
        chain = best_chain(found, settings.draft_length)
        tokens = torch.where(chain.scores.isfinite(), chain.tokens, settings.mask_token_id)
        return pad(tokens, (0, settings.frames - settings.draft_length), value=settings.mask_token_id)
