"""`Batch`: one decoding step for all sequences: draft, verify, accept, commit."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, Literal, TypedDict

import torch
from transformers import Cache

from ctc_drafter.decode.budget import Budget, Pace, Trees
from ctc_drafter.decode.pictures import Pictures
from ctc_drafter.decode.prefill import Prefill, check_prompts, prefill, prefill_groups, reread
from ctc_drafter.decode.sampling import ARGMAX, RowErrors, Sampler, chosen, tokens_along
from ctc_drafter.decode.sequence import SequenceState
from ctc_drafter.decode.stats import Stopwatch
from ctc_drafter.decode.tree import best_chain, build_tree, up_to, without_drafts
from ctc_drafter.decode.verify import follow, no_numbers, verify
from ctc_drafter.drafters.base import Drafter, DraftSession
from ctc_drafter.target.cache import compact, erase, extent, join
from ctc_drafter.target.checks import check_placement
from ctc_drafter.target.model import Target
from ctc_drafter.target.row_cache import RowCache
from ctc_drafter.target.threads import one_thread_beside
from ctc_drafter.types import Acceptance, Candidates, TokenTree, UserError, Verification


@dataclass(frozen=True)
class Step:
    """One verification of every row: the tree, the target's logits `[B, 1+N, V]` at its nodes, and what is accepted."""

    tree: TokenTree
    logits: torch.Tensor
    acceptance: Acceptance

    def emitted(self) -> tuple[list[list[int]], list[int]]:
        """Tokens to emit, as in `Acceptance`, and accepted nodes of each row."""
        return self.acceptance.tokens.tolist(), self.acceptance.counts.tolist()

    def emitted_logits(self) -> torch.Tensor:
        """The logits `[B, 1+D, V]` that each token of `Acceptance.tokens` was chosen from."""
        return self.logits.take_along_dim(self.acceptance.path.unsqueeze(-1), 1)


@dataclass(frozen=True)
class Judged:
    """A verification: what is accepted, None if nothing could be chosen, and the longest path of any row.

    broken: places of rows whose logits are no numbers.
    """

    tree: TokenTree
    verification: Verification
    acceptance: Acceptance | None
    longest: int
    broken: set[int]


Nodes = int | Literal["auto"]
AUTO: Literal["auto"] = "auto"
DEFAULT_NODES = 16  # of a tree of fixed size
DEFAULT_FLOOR = 0.02  # likewise


class DecodingOptions(TypedDict, total=False):
    """The fields of `DecodingConfig` as keyword arguments."""

    nodes: Nodes
    min_probability: float | None
    sampler: Sampler
    budget: Budget | None


@dataclass(frozen=True)
class DecodingConfig:
    """How rows are decoded, whatever the target and the drafter: in which trees, and who chooses the tokens.

    nodes: of a tree, at most; "auto" for trees as large as pays on this machine, and plain steps where none does. Step
    times are then measured when target and drafter are first used together, for some seconds, and kept
    (`profile.settled`). min_probability: prefixes less likely are not worth the time that a node adds to a
    verification; None for `DEFAULT_FLOOR` in trees of fixed size, and for what step times say otherwise. sampler:
    greedy unless told otherwise, as by `Sampled(seeds, warpers(temperature=0.8))`. budget: one that was measured for
    target and drafter; it chooses, up to its own nodes, whatever `nodes` is. Raises `UserError` for values that cannot
    be.
    """

    nodes: Nodes = AUTO
    min_probability: float | None = None
    sampler: Sampler = ARGMAX
    budget: Budget | None = None

    def __post_init__(self) -> None:
        nodes: Any = self.nodes
        floor: Any = self.min_probability
        if nodes != AUTO and (isinstance(nodes, bool) or not isinstance(nodes, Integral)):
            raise UserError(f"nodes is {nodes!r}; give a whole number, or {AUTO}")
        if nodes != AUTO and int(nodes) < 1:
            raise UserError(f"nodes is {nodes}; give at least 1, or use plain_generate")
        if floor is not None and (not isinstance(floor, Real) or not 0 <= float(floor) < 1):
            raise UserError(f"floor is {floor!r}; give a probability, at least 0 and below 1")
        if isinstance(self.sampler, type) or not callable(getattr(self.sampler, "sample", None)):
            name = self.sampler.__name__ if isinstance(self.sampler, type) else repr(self.sampler)
            raise UserError(f"{name} is no sampler; give one, such as Sampled(seeds, warpers(temperature=0.8))")
        if self.budget is not None and not isinstance(self.budget, Budget):
            raise UserError(f"{self.budget!r} is no budget; give what budget_for(target, drafter, nodes, rows) returns")
        if self.budget is not None and self.budget.nodes < 1:
            raise UserError(f"the budget has {self.budget.nodes} nodes; give at least 1, or use plain_generate")

    @property
    def fixed_nodes(self) -> int:
        """Nodes of a tree at most, where no budget chooses."""
        return DEFAULT_NODES if self.nodes == AUTO else int(self.nodes)

    @property
    def fixed_floor(self) -> float:
        """Least probability of a node, where no budget chooses."""
        return DEFAULT_FLOOR if self.min_probability is None else float(self.min_probability)

    @classmethod
    def of(cls, config: DecodingConfig | None, options: DecodingOptions) -> DecodingConfig:
        """The config, or the defaults, with these options instead of its own."""
        if not isinstance(config, cls | None):
            raise UserError(f"{config!r} is no DecodingConfig; give one, or its fields as keyword arguments")
        return replace(config or cls(), **options)

    def without_sampler(self, instead: str) -> DecodingConfig:
        """Raises `UserError` for a sampler where others choose the tokens."""
        if self.sampler is not ARGMAX:
            raise UserError(f"a sampler has no effect here; {instead}")
        return self


@dataclass(frozen=True)
class Method:
    """What rows are decoded by: the target, a drafter that fits it, and the settings of decoding.

    pictures: what the prompts of the call show, by the rows' index; all of them are then prefilled together.
    """

    target: Target
    drafter: Drafter
    config: DecodingConfig = DecodingConfig()
    pictures: Pictures | None = None

    def __post_init__(self) -> None:
        check_placement(self.target.model, self.drafter)
        self.target.check_drafter(self.drafter)


class Batch:
    """The sequences being decoded, in the row order of cache, drafter session, lengths and roots."""

    cache: Cache | RowCache
    session: DraftSession
    lengths: torch.Tensor  # committed tokens, int64 [B]
    root: torch.Tensor  # newest tokens, int64 [B]

    def __init__(self, method: Method, clock: Stopwatch):
        self.method, self.clock = method, clock
        self.trees: Trees | None = Pace(method.config.budget) if method.config.budget else None
        self.rows: list[SequenceState] = []
        self.shift: torch.Tensor | None = None  # see `Target.forward`

    def admit(self, rows: Sequence[SequenceState]) -> list[int]:
        """Prefills new rows, which take the last places; returns the first token of each."""
        return self.enter(rows)[0].tolist()

    def enter(self, rows: Sequence[SequenceState]) -> tuple[torch.Tensor, torch.Tensor]:
        """`admit`, as tensors: the first token `int64 [R]` of each new row, chosen from these logits `[R, V]`.

        Rows are prefilled in groups that are little padded. Where a group cannot be prefilled, or memory does not
        suffice for it beside the others, the batch stays as it was before that group, and the error is raised.
        """
        if self.method.pictures is not None or len(rows) < 2:
            return self._enter(rows)
        check_prompts(self.method.target, [row.prompt for row in rows], rows[0].index)
        roots, logits = zip(*(self._enter(group) for group in prefill_groups(rows)), strict=True)
        return torch.cat(roots), torch.cat(logits)

    def _enter(self, rows: Sequence[SequenceState]) -> tuple[torch.Tensor, torch.Tensor]:
        target, drafter, sampler = self.method.target, self.method.drafter, self.method.config.sampler
        with one_thread_beside(target), self.clock("prefill"):
            first = rows[0].index if rows else 0
            if self.method.pictures is None:
                state = prefill(target, [row.prompt for row in rows], drafter.feature_layers, first)
            else:
                assert not self.rows
                state = self.method.pictures.prefill(target, [row.index for row in rows], drafter.feature_layers)
            sampler.validate(rows[0], state.logits[:1])
            root = chosen(sampler, state.logits, rows)
            if self.rows:
                self._join(state)
                self.lengths = torch.cat([self.lengths, state.lengths])
                self.root = torch.cat([self.root, root])
            else:
                self.session = drafter.begin(*target.draft_modules, len(rows))
                self.session.extend(state.tokens, state.features, state.lengths)
                self.cache, self.lengths, self.root = state.cache, state.lengths, root
                self.shift = state.shift
        self.rows += rows
        return root, state.logits

    def _join(self, state: Prefill) -> None:
        before = extent(self.cache)
        try:
            join(self.cache, state.cache)
            self.session.join(state.tokens, state.features, state.lengths)
        except Exception:
            before.cut(self.cache)
            raise

    def keep(self, places: Sequence[int]) -> None:
        """Leaves only these places of the batch."""
        if len(places) == len(self.rows):
            return
        if not places:
            self.rows = []
            return
        rows = torch.tensor(places, device=self.root.device)
        self.session.select(rows)  # first: the others do not fail
        self.rows = [self.rows[place] for place in places]
        self.cache.batch_select_indices(rows)
        self.lengths, self.root = self.lengths[rows], self.root[rows]
        self.shift = None if self.shift is None else self.shift[..., rows]

    def step(self) -> Step:
        """One verification of every row, for a call that ends with the first error, which names its row."""
        try:
            return self.advance()
        except RowErrors as failed:
            raise failed.first from failed

    def advance(self) -> Step:
        """One verification of every row. The batch is as it was where it raises: `RowErrors` if single rows are why.

        Drafts that the target cannot compute spoil their row, rejected or not (`no_numbers`): such rows are verified
        again without drafts, before anything is kept. What is no number then is the target's own answer.
        """
        with one_thread_beside(self.method.target):
            return self._advance()

    def _advance(self) -> Step:
        target = self.method.target
        with self.clock("prefill"):
            reread(target, self.cache, self.lengths, self.rows)
        resting = self.cache.resting() if isinstance(self.cache, RowCache) else set()
        if len(resting) == len(self.rows):
            tree = build_tree(self.root, Candidates.nothing(self.root), 0)
        else:
            tree = self._draft() if self.trees is None else self._draft_what_pays(self.trees)
        if target.reread_at is not None:
            tree = up_to(tree, self.lengths, target.reread_at)
        plain = resting | {place for place, row in enumerate(self.rows) if row.broken}
        slots = self.cache.get_seq_length()
        try:
            judged = self._judge(without_drafts(tree, plain) if plain else tree, plain)
            if again := judged.broken - plain:
                erase(self.cache, slots)
                judged = self._judge(without_drafts(judged.tree, again), again | plain)
            assert judged.acceptance is not None
            tree, acceptance, verification = judged.tree, judged.acceptance, judged.verification
            path = acceptance.path[:, : judged.longest + 1]
            with self.clock("compact"):
                compact(self.cache, self.lengths, slots, path, acceptance.counts)
            with self.clock("draft"):
                self.session.extend(*committed(tree.tokens, verification.features, path), acceptance.counts + 1)
        except Exception:
            erase(self.cache, slots)
            raise
        if self.trees is not None and not resting:
            self.trees.note(slots, tree, acceptance)
        self.lengths, self.root = self.lengths + acceptance.counts + 1, acceptance.bonus
        for place, row in enumerate(self.rows):
            row.broken = place in judged.broken
        return Step(tree, verification.logits, acceptance)

    def _judge(self, tree: TokenTree, final: Collection[int]) -> Judged:
        """Verifies a tree and chooses the paths; final: rows without drafts, which are not verified again."""
        with self.clock("verify"):
            layers = self.method.drafter.feature_layers
            verification = verify(self.method.target, self.cache, self.lengths, tree, layers, self.shift)
        drafted = tree.tokens.shape[1] > 1
        with self.clock("accept"):
            broken = no_numbers(verification.logits)
            try:
                acceptance = follow(
                    tree, tokens_along(self.method.config.sampler, tree, verification.logits, self.rows)
                )
            except Exception:
                found = {place for place, is_broken in enumerate(broken.tolist()) if is_broken}
                if not drafted or not found.difference(final):
                    raise
                return Judged(tree, verification, None, 0, found)
            longest, *each = torch.cat([acceptance.counts.amax(0, keepdim=True), broken]).tolist()  # one wait for a GPU
        found = {place for place, is_broken in enumerate(each) if is_broken}
        return Judged(tree, verification, acceptance, longest, found)

    def _draft(self) -> TokenTree:
        nodes, min_probability = self.method.config.fixed_nodes, self.method.config.fixed_floor
        with self.clock("draft"):
            candidates = self._followed(self.session.propose(self.root, nodes, min_probability))
        with self.clock("tree"):
            return build_tree(self.root, candidates, nodes, min_probability)

    def _followed(self, candidates: Candidates) -> Candidates:
        """What the target can follow of a draft: all of it, or its best chain."""
        return candidates if self.method.target.chain is None else best_chain(candidates)

    def _draft_what_pays(self, trees: Trees) -> TokenTree:
        slots, rows = self.cache.get_seq_length(), len(self.rows)
        with self.clock("draft"):
            draft = self.session.propose if trees.drafts(rows) else self.session.free  # copies cost nothing
            floor = max(trees.min_probability(rows, slots), self.method.config.min_probability or 0.0)
            found = draft(self.root, trees.nodes, floor)
            candidates = Candidates.nothing(self.root) if found is None else self._followed(found)
        with self.clock("tree"):
            return build_tree(self.root, candidates, trees.size(candidates, slots))


def committed(
    tokens: torch.Tensor, features: torch.Tensor | None, path: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens and features of the path's nodes, which have entered the cache."""
    if features is not None:
        features = features.gather(1, path.unsqueeze(-1).expand(-1, -1, features.shape[-1]))
    return tokens.gather(1, path), features
