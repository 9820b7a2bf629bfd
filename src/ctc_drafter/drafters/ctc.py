"""The CTC drafter: frames with a blank, a predictor that ties them together, a prefix search."""

from __future__ import annotations

import torch
from torch import nn

from ctc_drafter.ctc.lattice import Lattice, lattice
from ctc_drafter.ctc.loss import ctc_objective, prefix_objective
from ctc_drafter.drafters.borrowed import BorrowedSearch, borrow_search
from ctc_drafter.drafters.config import CTCDrafterConfig
from ctc_drafter.drafters.frames import FramesModel
from ctc_drafter.drafters.predictor import Predictor
from ctc_drafter.drafters.trainable import Objective
from ctc_drafter.types import Candidates


class CTCDrafter(FramesModel):
    """Draft layers, blank head and predictor; from target features to frames, lattices and candidates."""

    config_class = CTCDrafterConfig
    config: CTCDrafterConfig

    def __init__(self, config: CTCDrafterConfig):
        super().__init__(config)
        self.predictor = None
        if config.predictor_rank:
            self.predictor = Predictor(
                config.vocab_size, config.hidden_size, config.predictor_rank, config.predictor_width
            )
        self.post_init()

    def objective(self, loss: str, decay: float) -> Objective:
        """`prefix`, or `ctc` for the full-sequence loss, which has no decay."""
        return prefix_objective(decay) if loss == "prefix" else ctc_objective

    def likelihood(self, blocks: torch.Tensor, prefixes: torch.Tensor, embed: nn.Module, head: nn.Module) -> Lattice:
        return self.lattice(blocks, prefixes, embed, head)

    def lattice(self, blocks: torch.Tensor, prefixes: torch.Tensor, embed: nn.Module, head: nn.Module) -> Lattice:
        """The lattice of known continuations: prefixes `int64 [N, 1+U]`, the root and y1..yU."""
        tokens, blanks = self.frame_logits(blocks, head)
        bias = None
        if self.predictor is not None:
            previous = torch.cat([prefixes.new_full((len(prefixes), 1), -1), prefixes[:, :-1]], 1)
            root_state = self.predictor.root_state(blocks[:, 0])
            bias = self.predictor.output(self.predictor.state(previous, prefixes, root_state, embed)).float()
        return lattice(tokens, blanks, prefixes[:, 1:], bias)

    def candidates(
        self, blocks: torch.Tensor, root: torch.Tensor, borrowed: BorrowedSearch, nodes: int, floor: float = 0.0
    ) -> Candidates:
        """See `TrainableDrafter.candidates`; block outputs are `[N, 1+F, H]`."""
        return borrowed.search(*self.frame_logits(blocks, borrowed.head), root, blocks[:, 0], nodes, floor)

    def prepare(self, embed: nn.Module, head: nn.Module) -> BorrowedSearch:
        return borrow_search(self.predictor, self.config.draft_length, embed, head)
