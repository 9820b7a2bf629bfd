"""Ways to decode that are measured against each other: plain, and drafted in chains or trees of a size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ctc_drafter.chat import eos_ids
from ctc_drafter.decode.budget import Budget
from ctc_drafter.decode.generate import Generation, generate, plain_generate
from ctc_drafter.decode.sampling import ARGMAX, Chooser
from ctc_drafter.drafters.base import Drafter
from ctc_drafter.drafters.registry import method_of
from ctc_drafter.drafters.trainable import network_of
from ctc_drafter.evaluate.calibration import Calibration, Watched
from ctc_drafter.evaluate.chain import POOL, Chained
from ctc_drafter.evaluate.records import PLAIN, Key
from ctc_drafter.target.model import Target

CHAIN, BUDGET = "chain", "budget"

# (prompts as token ids, timed, where to count what trees promised) -> what was generated
Decode = Callable[[list[list[int]], bool, Calibration | None], Generation]


@dataclass(frozen=True)
class Contender:
    """A way to decode. nodes: "chain", a tree's size, "budget" for what pays, None for plain decoding."""

    method: str
    nodes: int | str | None
    run: Decode

    @property
    def key(self) -> Key:
        return self.method, self.nodes


@dataclass(frozen=True)
class Decoding:
    """Makes contenders that share everything but the drafter and its trees."""

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
        size: int,
        floor: float,
        chooser: Chooser = ARGMAX,
        budget: Budget | None = None,
    ) -> Contender:
        """Trees of up to `size` nodes, or of a budget's choice; results call them `nodes`."""

        def run(prompts: list[list[int]], timed: bool, calibration: Calibration | None) -> Generation:
            return generate(
                self.target,
                drafter,
                prompts,
                max_new_tokens=self.max_new_tokens,
                nodes=size,
                floor=floor,
                budget=budget,
                eos=self.eos,
                chooser=Watched(calibration, chooser) if calibration else chooser,
                timed=timed,
            )

        return Contender(method, nodes, run)

    def of_size(self, method: str, drafter: Drafter, nodes: int | str, chooser: Chooser = ARGMAX) -> Contender:
        """A chain of the drafter's network, or trees of so many nodes: without a floor, as far as it has as many."""
        if nodes == CHAIN:
            return self.drafted(method, Chained(network_of(drafter)), CHAIN, POOL, 0.0, chooser)
        return self.drafted(method, drafter, nodes, int(nodes), 0.0, chooser)


def decoding(target: Target, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Decoding:
    return Decoding(target, frozenset(eos_ids(target.model, tokenizer)), max_new_tokens)


def contenders_of(
    decoding: Decoding, drafter: Drafter, nodes: int, floor: float, budget: Budget | None
) -> list[Contender]:
    """Plain decoding and the drafter's, under a budget as well if there is one."""
    method = method_of(drafter)
    found = [decoding.plain(), decoding.drafted(method, drafter, nodes, nodes, floor)]
    return found if budget is None else [*found, decoding.drafted(method, drafter, BUDGET, nodes, floor, budget=budget)]
