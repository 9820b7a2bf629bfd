"""`CTCDrafter`: block network with blank and predictor, its loss and its candidates."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from ctc_drafter.ctc.copies import Copies, Text
from ctc_drafter.ctc.joint import JointTerms
from ctc_drafter.ctc.lattice import Lattice, lattice
from ctc_drafter.ctc.loss import FLOOR, ctc_objective, prefix_log_probs, prefix_loss, teacher_loss
from ctc_drafter.drafters.base import DraftSession
from ctc_drafter.drafters.block import BlockConfig, BlockModel, frame_logits
from ctc_drafter.drafters.ctc_session import CTCSession, SearchHead, search_head
from ctc_drafter.drafters.joint import JointNetwork, TokenMap
from ctc_drafter.drafters.lm_head import columns_of, drafted_part, head_logits, narrow_head
from ctc_drafter.drafters.predictor import Predictor
from ctc_drafter.drafters.trainable import DraftAt, LossInputs, LossOptions
from ctc_drafter.types import Candidates, UserError

COPYING = "predictor.copying."  # tensors of the copies
TEACHER_TOKENS = 8  # of the target's distribution that a drafter learns from
TEACHER_ROWS = 512  # whose logits are in memory at a time


# Block drafters whose frames may hold a blank: what the CTC drafters share.


class FramesConfig(BlockConfig):
    """See `BlockConfig`.

    Args:
        frames: CTC frames a pass fills (F). draft_length: longest prefix that is drafted, at most F.
    """

    model_type = "frames_drafter"

    frames: int = 8

    def check(self) -> None:
        if not 1 <= self.draft_length <= self.frames:
            raise UserError(f"draft_length {self.draft_length} must lie between 1 and frames ({self.frames})")
        super().check()


class FramesModel(BlockModel):
    """Draft layers and a linear blank head."""

    config: FramesConfig

    def __init__(self, config: FramesConfig):
        super().__init__(config)
        self.blank_head = nn.Linear(config.hidden_size, 1)

    @property
    def frames(self) -> int:
        return self.config.frames

    def frame_logits(self, states: torch.Tensor, head: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Block outputs `[N, 1+F, H]` to float32 token logits `[N, F, V]` and blank logits `[N, F]`."""
        blanks = self.blank_head(states[:, 1:].flatten(0, 1)).view(len(states), -1)
        return frame_logits(states, head), blanks.float()


# Configuration of the CTC drafter.


class CTCDrafterConfig(FramesConfig):
    """All sizes of a CTC drafter, with those of `FramesConfig`.

    Args:
        predictor_rank: rank of the predictor's bias, 0 for none. predictor_width: its MLP; 0 for what the last token
            says alone. predictor_tied: maps of the target's embedding in place of tables of its own.
        draft_vocab_size: tokens that are drafted, 0 for all; `CTCDrafter.draft_only` says which.
        joint_tokens: likeliest tokens of each frame whose logits also get a joint term of frame and prefix
            (`ctc/joint.py`), 0 for none. joint_rank: rank of those terms.
        copies: the longest agreement with an earlier place of the text that counts (`ctc/copies.py`), 0 for no copies.
        lookup_length: most tokens to copy from the text without asking the frames, 0 for none
            (`drafters/ctc_session.py`).
    """

    model_type = "ctc_drafter"

    predictor_rank: int = 64
    predictor_width: int = 256
    predictor_tied: bool = False
    draft_vocab_size: int = 0
    joint_tokens: int = 0
    joint_rank: int = 64
    copies: int = 0
    lookup_length: int = 0

    def check(self) -> None:
        super().check()
        if not 0 <= self.draft_vocab_size <= self.vocab_size:
            raise UserError(f"draft_vocab_size {self.draft_vocab_size} must lie between 0 and {self.vocab_size}")
        if self.joint_tokens < 0 or self.joint_rank < 1:
            raise UserError(
                f"joint_tokens is {self.joint_tokens} and joint_rank {self.joint_rank}; "
                "give tokens from 0 and a rank from 1"
            )
        if self.joint_tokens and not (self.predictor_rank and self.predictor_width):
            raise UserError(
                "joint terms need the predictor; set predictor_rank and predictor_width above 0, or joint_tokens to 0"
            )
        if self.copies < 0:
            raise UserError(f"copies is {self.copies}; give the longest agreement that counts, or 0 for no copies")
        if self.lookup_length < 0:
            raise UserError(f"lookup_length is {self.lookup_length}; give the most tokens to copy, or 0 for none")
        if self.copies and not (self.predictor_rank and self.predictor_width):
            raise UserError("copies need the predictor; set predictor_rank and predictor_width above 0, or copies to 0")


class CTCDrafter(FramesModel):
    """Draft layers, blank head and predictor; from target features to frames, lattices and candidates."""

    config_class = CTCDrafterConfig
    config: CTCDrafterConfig

    def __init__(self, config: CTCDrafterConfig):
        super().__init__(config)
        self.predictor = None
        if config.predictor_rank:
            sizes = (config.vocab_size, config.hidden_size, config.predictor_rank, config.predictor_width)
            self.predictor = Predictor(*sizes, config.draft_vocab_size, config.copies, config.predictor_tied)
        self.joint = None
        if config.joint_tokens:
            sizes = (config.hidden_size, config.predictor_width, config.joint_rank, config.joint_tokens)
            self.joint = JointNetwork(*sizes)
        if config.draft_vocab_size:
            # Offsets of the tokens from their columns, as EAGLE-3 has them; at first the lowest ids.
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
        self.post_init()

    @property
    def vocabulary(self) -> torch.Tensor | None:
        """The tokens that are drafted, sorted, `int64 [V]`; None for all."""
        if not self.config.draft_vocab_size:
            return None
        offsets = cast(torch.Tensor, self.d2t)
        return offsets + torch.arange(len(offsets), device=offsets.device)

    def check_weights(self, name: str) -> None:
        """See `TrainableDrafter.check_weights`."""
        tokens = self.vocabulary
        if tokens is None or tokens.is_meta:
            return
        inside = bool(((tokens >= 0) & (tokens < self.config.vocab_size)).all())
        if not inside or len(tokens.unique()) < len(tokens):
            what = (
                "names a token twice" if inside else f"names tokens beyond the {self.config.vocab_size} of its target"
            )
            raise UserError(f"{name} is damaged: its draft vocabulary (d2t) {what}; download it again")

    def draft_only(self, tokens: torch.Tensor, head: nn.Module | None = None, embed: nn.Module | None = None) -> None:
        """Drafts these tokens from now on: sorted ids `int64 [V]`, `draft_vocab_size` of them. For fresh drafters.

        head and embed: the target's LM head and embedding, for the predictor to start from.
        """
        offsets = cast(torch.Tensor, self.d2t)
        offsets.copy_(tokens.to(offsets.device) - torch.arange(len(offsets), device=offsets.device))
        if self.predictor is not None and head is not None:
            self.predictor.start_from(head, self.vocabulary, embed)

    def start_from(self, norm_scale: torch.Tensor | None, head: nn.Module, embed: nn.Module | None = None) -> None:
        """See `BlockModel.start_from`; so does the predictor from the LM head, with a draft vocabulary once that is
        chosen (`draft_only`)."""
        super().start_from(norm_scale, head, embed)
        if self.predictor is not None and self.vocabulary is None:
            self.predictor.start_from(head, None, embed)

    @torch.no_grad()
    def pruned(self, tokens: torch.Tensor) -> CTCDrafter:
        """The same drafter that drafts these tokens alone: sorted ids `int64 [V]`, all of its own vocabulary."""
        columns = self.columns(tokens)
        if (columns < 0).any():
            raise UserError("the drafter does not draft some of these tokens; prune one that drafts them all")
        config = copy.deepcopy(self.config)
        config.draft_vocab_size = len(tokens)
        narrow, weights = type(self)(config), {k: v for k, v in self.state_dict().items() if k != "d2t"}
        if self.predictor is not None and not config.predictor_tied:
            weights["predictor.output.weight"] = weights["predictor.output.weight"][columns]
        narrow.load_state_dict(weights | {"d2t": tokens - torch.arange(len(tokens), device=tokens.device)})
        return narrow.to(self.device, self.dtype).eval()

    def without_copies(self) -> CTCDrafter:
        """See `TrainableDrafter.without_copies`. What was learnt of copies stays unused: it is not as good as a drafter
        that was trained without them."""
        alone = self.with_lookup(0)
        if not self.config.copies:
            return alone
        alone = copy.copy(alone)
        alone.config = copy.copy(alone.config)
        alone.config.copies = 0  # sessions keep no text then, and nothing to copy from is given
        return alone

    def with_lookup(self, length: int) -> CTCDrafter:
        """See `TrainableDrafter.with_lookup`."""
        if self.config.lookup_length == length:
            return self
        network = copy.copy(self)
        network.config = copy.copy(self.config)
        network.config.lookup_length = length
        return network

    def narrowed(self, head: nn.Module) -> nn.Module:
        """The LM head for the tokens that are drafted; one that is so already stays as it is."""
        size = self.config.draft_vocab_size
        if self.vocabulary is None or getattr(head, "out_features", None) == size != self.config.vocab_size:
            return head
        return narrow_head(head, self.vocabulary)

    def check_loss(self, loss: str) -> None:
        """`prefix`, `teacher`, or `ctc` for the full-sequence loss, which has no decay."""

    @torch.no_grad()
    def teacher(self, last: torch.Tensor, head: nn.Module) -> torch.Tensor:
        """The target's `TEACHER_TOKENS` likeliest tokens of the draft vocabulary after each token, `[B, T, 2K]`: places
        in the frames' logits, then probabilities, whose sum is 1."""
        narrow = self.narrowed(head)
        parts = [head_logits(narrow, part) for part in last.flatten(0, 1).split(TEACHER_ROWS)]
        top = [part.topk(min(TEACHER_TOKENS, part.shape[-1])) for part in parts]
        places, values = torch.cat([each.indices for each in top]), torch.cat([each.values for each in top])
        return torch.cat([places.float(), values.softmax(-1)], -1).view(*last.shape[:2], -1)

    def loss(self, inputs: LossInputs, embed: nn.Module, head: nn.Module, options: LossOptions) -> torch.Tensor:
        """See `TrainableDrafter.loss`."""
        others, probabilities = None, None
        if options.loss == "teacher":
            assert inputs.last is not None
            places, probabilities = inputs.last.chunk(2, -1)
            others = places.long()
        found = self.lattice(inputs.states, inputs.prefixes, embed, head, inputs.copies, others)
        with torch.autocast(inputs.states.device.type, enabled=False):
            labels, valid = self.labels(inputs.prefixes, inputs.valid)
            if others is not None and probabilities is not None:
                return teacher_loss(found, labels, valid, others, probabilities, options.decay)
            if options.loss == "prefix":
                return prefix_loss(found, labels, valid, options.decay)
            return ctc_objective(found, labels, valid)

    def filled(self, states: torch.Tensor) -> torch.Tensor:
        """What `draft_states` gives of N anchors as block outputs `[N, 1+F, H]`."""
        return states

    def labels(self, prefixes: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """y1..yU `int64 [N, U]` as places in the frames' logits, and those of the valid ones that can be learnt: a
        draft ends before a token outside the vocabulary."""
        columns = self.columns(prefixes[:, 1:])
        return columns, drafted_part(columns, valid)

    def columns(self, tokens: torch.Tensor) -> torch.Tensor:
        """Places of tokens in the frames' logits, -1 for those that are not drafted."""
        return tokens if self.vocabulary is None else columns_of(tokens, self.vocabulary)

    def lattice(
        self,
        states: torch.Tensor,
        prefixes: torch.Tensor,
        embed: nn.Module,
        head: nn.Module,
        copies: torch.Tensor | None = None,
        others: torch.Tensor | None = None,
    ) -> Lattice:
        """The lattice of known continuations: prefixes `int64 [N, 1+U]`, root and y1..yU; copies: see `LossInputs`;
        others `int64 [N, U, K]`: places in the frames' logits, see `Lattice`."""
        tokens, blanks, bias, joint = self.scores(states, prefixes, embed, head, copies)
        return lattice(tokens, blanks, self.columns(prefixes[:, 1:]), bias, others, joint)

    def scores(
        self,
        states: torch.Tensor,
        prefixes: torch.Tensor,
        embed: nn.Module,
        head: nn.Module,
        copies: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, JointTerms | None]:
        """Token logits `[N, F, V]`, blank logits `[N, F]`, and the bias `[N, 1+U, V]` and the joint terms after each
        prefix, None without a predictor or a joint network; arguments as in `lattice`."""
        states = self.filled(states)
        tokens, blanks = self.frame_logits(states, self.narrowed(head))
        bias, joint = None, None
        if self.predictor is not None:
            previous = torch.cat([prefixes.new_full((len(prefixes), 1), -1), prefixes[:, :-1]], 1)
            root_state = self.predictor.root_state(states[:, 0])
            suggested = None
            if copies is not None:
                suggested = Copies(self.columns(copies[..., 0]), copies[..., 1])
            rows = self.predictor.output_rows(embed, self.vocabulary)
            bias = self.predictor.bias(previous, prefixes, root_state, embed, suggested, rows)
            if self.joint is not None:
                hidden = self.predictor.hidden(previous, prefixes, root_state, embed)
                columns = self.joint.columns(tokens)
                joint = self.joint.terms(states[:, 1:], hidden, columns, self.predictor.drafted(self.vocabulary), embed)
        return tokens, blanks, bias, joint

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TokenMap):
            nn.init.zeros_(module.weight)

    def log_likelihoods(
        self, inputs: LossInputs, embed: nn.Module, head: nn.Module, temperatures: Sequence[float]
    ) -> torch.Tensor:
        """See `TrainableDrafter.log_likelihoods`: log prefix(u) of all valid labels of each anchor together."""
        tokens, blanks, bias, joint = self.scores(inputs.states, inputs.prefixes, embed, head, inputs.copies)
        labels, valid = self.labels(inputs.prefixes, inputs.valid)
        last = valid.sum(1, keepdim=True) - 1
        found = []
        for each in temperatures:
            divided = None if bias is None else bias / each, None, None if joint is None else joint.divided(each)
            made = lattice(tokens / each, blanks / each, labels, *divided)
            prefixes = prefix_log_probs(made, labels).gather(1, last.clamp(min=0))
            counts = (last >= 0) & (prefixes > FLOOR)  # no temperature makes room for what has none
            found.append(prefixes.where(counts, 0.0).sum(dtype=torch.float64))
        return torch.stack(found)

    def candidates(
        self,
        states: torch.Tensor,
        root: torch.Tensor,
        heads: SearchHead,
        nodes: int,
        min_probability: float = 0.0,
        text: Text | None = None,
    ) -> Candidates:
        """See `TrainableDrafter.candidates`. text: up to the roots, to copy from."""
        states = self.filled(states)
        return heads.search(*self.frame_logits(states, heads.head), root, states, text, nodes, min_probability)

    def best_first(self, heads: SearchHead) -> bool:
        """See `TrainableDrafter.best_first`: so is the search for a CPU."""
        return next(heads.embed.parameters()).device.type == "cpu"

    def drafting_at(
        self, features: torch.Tensor, tokens: torch.Tensor, anchors: torch.Tensor, used: torch.Tensor, heads: SearchHead
    ) -> DraftAt:
        """See `TrainableDrafter.drafting_at`."""
        states = self.draft_states(features, tokens, anchors, heads.embed)[used]
        rows, ends = used.nonzero()[:, 0], anchors[used]

        def draft(part: torch.Tensor, nodes: int) -> Candidates:
            row, end = rows[part], ends[part]
            text = Text(tokens[row], end) if self.config.copies else None
            return self.candidates(states[part], tokens[row, end], heads, nodes, text=text)

        return draft

    def begin(self, embed: nn.Module, head: nn.Module, batch_size: int) -> DraftSession:
        """See `Drafter.begin`."""
        copies, lookup_length = bool(self.config.copies), self.config.lookup_length
        return CTCSession(self, self.prepared(embed, head), batch_size, copies, lookup_length)

    def prepare(self, embed: nn.Module, head: nn.Module) -> SearchHead:
        given = self.predictor, self.joint, self.config.draft_length, embed, self.narrowed(head), self.vocabulary
        return search_head(*given, self.config.score_temperature)
