"""Decoding methods under test: plain, best chain, trees of a size; calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ctc_drafter.chat import eos_ids
from ctc_drafter.decode.batch import DecodingConfig
from ctc_drafter.decode.generate import Generation, generate, plain_generate
from ctc_drafter.decode.sampling import ARGMAX, Sampler
from ctc_drafter.decode.sequence import SequenceState
from ctc_drafter.decode.stats import Stats
from ctc_drafter.decode.tree import best_chain
from ctc_drafter.drafters.base import Drafter, DraftSession, refuse_call
from ctc_drafter.drafters.registry import method_of
from ctc_drafter.drafters.trainable import network_of
from ctc_drafter.evaluate.results import BUDGET, CHAIN, PLAIN, Key
from ctc_drafter.target.model import Target
from ctc_drafter.types import Candidates, TokenTree

# Calibration: acceptance of nodes by bins of the probability that the drafter gave them.

BINS = 20  # of equal width, from 0 to 1


@dataclass
class Calibration:
    """Calibration by bins of probability: verified nodes, sum of their probabilities, accepted nodes."""

    nodes: list[float] = field(default_factory=lambda: [0.0] * BINS)
    predicted: list[float] = field(default_factory=lambda: [0.0] * BINS)
    accepted: list[float] = field(default_factory=lambda: [0.0] * BINS)

    def add(self, tree: TokenTree, target_tokens: torch.Tensor) -> None:
        """Counts a tree whose nodes the target follows with `target_tokens int64 [B, 1+N]`."""
        agrees = (tree.tokens == target_tokens.gather(1, tree.parents)) & tree.valid
        agrees[:, 0] = True
        on_path = ~(tree.ancestors & ~agrees.unsqueeze(1)).any(-1)
        counted = tree.valid[:, 1:]
        scores, reached = tree.scores[:, 1:][counted].exp().double(), on_path[:, 1:][counted].double()
        place = (scores * BINS).long().clamp(max=BINS - 1)
        self.nodes = [a + b for a, b in zip(self.nodes, totals(place, torch.ones_like(scores)), strict=True)]
        self.predicted = [a + b for a, b in zip(self.predicted, totals(place, scores), strict=True)]
        self.accepted = [a + b for a, b in zip(self.accepted, totals(place, reached), strict=True)]

    @property
    def error(self) -> float | None:
        """The expected calibration error of Guo et al., "On Calibration of Modern Neural Networks" (2017): how far a
        node's probability is from the share accepted in its bin, averaged over all nodes; None for no nodes."""
        gaps = (abs(promised - hits) for promised, hits in zip(self.predicted, self.accepted, strict=True))
        return sum(gaps) / sum(self.nodes) if any(self.nodes) else None

    def include(self, other: Calibration) -> None:
        """Adds what another one counted."""
        for name in ("nodes", "predicted", "accepted"):
            ours, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, [a + b for a, b in zip(ours, theirs, strict=True)])


# Decoding methods under test: plain, chains, trees of a size.

# (prompts as token ids, timed, where to count what trees promised) -> what was generated
Decode = Callable[[list[list[int]], bool, Calibration | None], Generation]
# (rows of a batch, tokens of the longest prompt with its answer): what is done before anything is timed
Prepare = Callable[[int, int], None]


@dataclass(frozen=True)
class Contender:
    """A way to decode. nodes: "chain", a tree's size, "budget" for what pays, None for plain decoding.

    facts: of an engine that is not ours, its version and the type of its weights, for the results.
    """

    method: str
    nodes: int | str | None
    run: Decode
    prepare: Prepare | None = None
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        return self.method, self.nodes


@dataclass(frozen=True)
class Counted(Generation):
    """What another engine generated. steps: verifications of each row, which `accepted` need not list one by one."""

    steps: list[int] = field(default_factory=list)


def counted(tokens: list[list[int]], accepted: list[list[int]], steps: list[int] | None = None) -> Counted:
    """steps: as many as `accepted` lists, unless they are given."""
    found = list(map(len, accepted)) if steps is None else steps
    stats = Stats(tokens=sum(map(len, tokens)), steps=sum(found))
    return Counted(tokens, stats, accepted, found)


def steps_of(generation: Generation) -> list[int]:
    """Verifications of each row."""
    return generation.steps if isinstance(generation, Counted) else list(map(len, generation.accepted))


@dataclass(frozen=True)
class Decoding:
    """Makes methods under test that share everything but the drafter and its trees."""

    target: Target
    eos: frozenset[int]
    max_new_tokens: int

    def plain(self) -> Contender:
        def run(prompts: list[list[int]], timed: bool, _: Calibration | None) -> Generation:
            return plain_generate(self.target, prompts, max_new_tokens=self.max_new_tokens, eos=self.eos, timed=timed)

        return Contender(PLAIN, None, run)

    def drafted(
        self,
        method: str,
        drafter: Drafter,
        nodes: int | str,
        config: DecodingConfig,
    ) -> Contender:
        """Trees as the config says; results call them `nodes`."""

        def run(prompts: list[list[int]], timed: bool, calibration: Calibration | None) -> Generation:
            return generate(
                self.target,
                drafter,
                prompts,
                max_new_tokens=self.max_new_tokens,
                config=replace(config, sampler=Watched(calibration, config.sampler)) if calibration else config,
                eos=self.eos,
                timed=timed,
            )

        return Contender(method, nodes, run)

    def of_size(self, method: str, drafter: Drafter, nodes: int | str, sampler: Sampler = ARGMAX) -> Contender:
        """A chain of the drafter's network, or trees of so many nodes: without a floor, as far as it has as many."""
        if nodes == CHAIN:
            return self.drafted(method, Chained(network_of(drafter)), CHAIN, DecodingConfig(POOL, 0.0, sampler))
        return self.drafted(method, drafter, nodes, DecodingConfig(int(nodes), 0.0, sampler))


def decoding(target: Target, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Decoding:
    return Decoding(target, frozenset(eos_ids(target.model, tokenizer)), max_new_tokens)


def contenders_of(decoding: Decoding, drafter: Drafter, config: DecodingConfig) -> list[Contender]:
    """Plain decoding and the drafter's without a budget, and under it if there is one."""
    method, fixed = method_of(drafter), fixed_size(config)
    found = [decoding.plain(), decoding.drafted(method, drafter, config.fixed_nodes, fixed)]
    return found if config.budget is None else [*found, decoding.drafted(method, drafter, BUDGET, config)]


def fixed_size(config: DecodingConfig) -> DecodingConfig:
    """The config where no budget chooses."""
    return replace(config, nodes=config.fixed_nodes, budget=None)


# Chains: the best single path of a tree.

POOL = 64  # prefixes among which the path is looked for, as in the held-out β of training


@dataclass(frozen=True)
class Chained:
    """A drafter that proposes a single path: the one with the largest sum of prefix probabilities.

    That is the chain of which most tokens will be accepted, by the drafter's belief; following the likeliest child from
    the root down can miss it. It is looked for among the `POOL` best prefixes. Method after method pays for these, so γ
    of chains says less than β.
    """

    drafter: Drafter

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return self.drafter.feature_layers

    __call__ = refuse_call

    def begin(self, embed: nn.Module, head: nn.Module, batch_size: int) -> ChainedSession:
        """See `Drafter.begin`."""
        return ChainedSession(self.drafter.begin(embed, head, batch_size))


class ChainedSession:
    """See `DraftSession`."""

    def __init__(self, inner: DraftSession):
        self.inner = inner
        self.extend, self.join, self.select = inner.extend, inner.join, inner.select

    def free(self, root: torch.Tensor, nodes: int, min_probability: float) -> Candidates | None:
        return None

    def propose(self, root: torch.Tensor, nodes: int, min_probability: float) -> Candidates:
        found = self.inner.propose(root, max(nodes, POOL), min_probability)
        return best_chain(found) if found.tokens.shape[1] else found


def totals(place: torch.Tensor, values: torch.Tensor) -> list[float]:
    """Sums of values `[N]` by bin, `int64 [N]`."""
    found: list[float] = torch.bincount(place, values, BINS).tolist()
    return found


@dataclass(frozen=True)
class Watched:
    """A sampler that counts what its trees promised. It takes time: not for runs that are timed."""

    calibration: Calibration
    sampler: Sampler = ARGMAX

    def validate(self, row: SequenceState, logits: torch.Tensor) -> None:
        self.sampler.validate(row, logits)

    def sample(self, logits: torch.Tensor, rows: Sequence[SequenceState]) -> torch.Tensor:
        return self.sampler.sample(logits, rows)

    def sample_tree(self, tree: TokenTree, logits: torch.Tensor, rows: Sequence[SequenceState]) -> torch.Tensor:
        target_tokens = self.sampler.sample_tree(tree, logits, rows)
        self.calibration.add(tree, target_tokens)
        return target_tokens
