"""Walks of one network along texts: each of its drafts is made once, for all sizes and aids that ask for it.

What a network proposes at a place of a text depends on the text alone, so a place is drafted when the first walk stops
there, and what was found serves trees of all sizes, chains, and drafts with copies among them. Walks go in rounds: what
all of them need next is drafted together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ctc_drafter.decode.tree import best_chain, build_tree
from ctc_drafter.decode.verify import follow
from ctc_drafter.drafters.base import Drafter, state_of
from ctc_drafter.drafters.copying import Copying
from ctc_drafter.drafters.prompt_lookup import LookupSession, PromptLookup
from ctc_drafter.drafters.trainable import DraftAt, TrainableDrafter, network_of
from ctc_drafter.evaluate.methods import POOL, Calibration
from ctc_drafter.evaluate.results import CHAIN
from ctc_drafter.target.model import Target
from ctc_drafter.types import Candidates, TokenTree

Size = int | str
Cut = Callable[[torch.Tensor, Candidates], TokenTree]  # the tree of a draft after root int64 [1]
LOGITS_AT_A_TIME = 2**28  # bytes, of the prefixes that are asked for their next tokens


@dataclass(frozen=True)
class Text:
    """A prompt, the answer that plain decoding wrote, and the target's features `[T, K]` of both."""

    prompt: list[int]
    answer: list[int]
    layers: tuple[int, ...]
    features: torch.Tensor | None

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *self.answer]

    @property
    def last(self) -> int:
        """The place of the answer's last token, after which nothing is drafted."""
        return len(self.answer) - 1

    def features_of(self, layers: Sequence[int], begin: int, end: int) -> torch.Tensor | None:
        """`[end - begin, K]` of these layers alone, in their order."""
        if not layers or self.features is None:
            return None
        width = self.features.shape[-1] // len(self.layers)
        parts = [self.layers.index(layer) * width for layer in layers]
        return torch.cat([self.features[begin:end, at : at + width] for at in parts], -1)


def cut_of(size: Size, nodes: int) -> Cut:
    """The tree of a draft that results call by this size."""
    if size == CHAIN:
        return lambda root, found: build_tree(root, best_chain(found) if found.tokens.shape[1] else found, nodes)
    return lambda root, found: build_tree(root, found, int(size))


@dataclass
class Found:
    """What trees of one size would have done with a text. accepted: drafted tokens that each step accepted."""

    accepted: list[int] = field(default_factory=list)
    calibration: Calibration = field(default_factory=Calibration)

    def step(self, tree: TokenTree, text: Text, place: int) -> int:
        """Follows the tree, of one row, whose root stands at this place of the answer; the tokens that are accepted.

        The calibration leaves out trees that reach beyond the end of the answer, of which nobody knows what the target
        would have said.
        """
        depths = tree.depths.masked_fill(~tree.valid, 0)
        longest = int(depths.amax())
        # After a node of depth d comes what stands d + 1 further. -1 is no token: what is drafted past the end of the
        # answer is not accepted.
        after = torch.tensor([[*text.answer[place + 1 :], *[-1] * (longest + 1)]], device=depths.device)
        wanted = after.gather(1, depths)
        count = int(follow(tree, wanted).counts)
        self.accepted.append(count)
        if place + longest < len(text.answer):
            self.calibration.add(tree, wanted)
        return count


@dataclass(frozen=True)
class Way:
    """How a drafter makes trees of one size: as its session does, with its network apart.

    nodes: what the drafter is asked for; `CHAIN` is looked for among `POOL`. lookup: most tokens that prompt lookup
    copies without the network, 0 for none. copying: how copies come among the network's drafts, None for not at all.
    """

    size: Size
    network: TrainableDrafter
    lookup: int
    copying: Copying | None

    @property
    def nodes(self) -> int:
        return POOL if self.size == CHAIN else int(self.size)

    @property
    def own_size(self) -> bool:
        """Whether what the network proposes for more nodes would not do."""
        return self.copying is not None or self.size == CHAIN


def way_of(drafter: Drafter, size: Size) -> Way | None:
    """The drafter's way to trees of this size; None for a drafter whose drafts are not a trained network's."""
    asked = network_of(drafter) if size == CHAIN else drafter
    copying = asked if isinstance(asked, Copying) else None
    inner = copying.inner if copying else asked
    if not isinstance(inner, TrainableDrafter) or (copying and lookup_of(inner)):
        return None
    lookup = copying.lookup_length if copying else lookup_of(inner)
    return Way(size, inner.without_lookup(), lookup, copying)


def lookup_of(drafter: TrainableDrafter) -> int:
    return int(getattr(drafter.config, "lookup_length", 0))


def network_key(network: TrainableDrafter) -> tuple[Any, ...]:
    """Equal for drafters that draft alike: by weights and config."""
    return type(network), state_of(network), json.dumps(network.config.to_dict(), sort_keys=True, default=str)


def nodes_asked(ways: Iterable[Way], best_first: bool) -> dict[Way, int]:
    """What each way asks the network for: as little as serves it, and one number for as many as can be.

    The best n prefixes are the best n of more, so trees share the drafts of the largest. Chains, and drafts with copies
    among them, need what is proposed for their own size: a chain is looked for among all of it, and what the network
    did not propose is given another probability. best_first: whether that is the first part of what is proposed for
    more.
    """
    ways = list(ways)
    shared = max((way.nodes for way in ways if best_first or way.copying is None), default=0)
    return {way: shared if best_first or not way.own_size else way.nodes for way in ways}


@dataclass(frozen=True)
class Place:
    """The root of a draft: its place in the answer of the text of this number."""

    text: int
    place: int


class Drafts:
    """What a network proposes at places of texts, each drafted once."""

    def __init__(self, target: Target, network: TrainableDrafter, texts: Sequence[Text]):
        self.texts, self.network, self.vocab_size = texts, network, target.vocab_size
        rows = [text.features_of(network.feature_layers, 0, len(text.tokens)) for text in texts]
        features = [row for row in rows if row is not None]
        tokens = [torch.tensor(text.tokens, device=target.device) for text in texts]
        places = [torch.arange(text.last, device=target.device) for text in texts]
        anchors = [len(text.prompt) + each for text, each in zip(texts, places, strict=True)]
        used = pad_sequence([torch.ones_like(each, dtype=torch.bool) for each in anchors], True)
        heads = network.prepared(*target.draft_modules)
        self.draft: DraftAt = network.drafting_at(
            pad_sequence(features, True), pad_sequence(tokens, True), pad_sequence(anchors, True), used, heads
        )
        self.starts = [sum(len(each) for each in places[:number]) for number in range(len(places))]
        self.device = target.device
        self.known: dict[tuple[Place, int], Candidates] = {}

    def make(self, wanted: Iterable[tuple[Place, int]]) -> None:
        """Drafts what is not known yet, for so many nodes each."""
        missing = sorted(set(wanted) - self.known.keys(), key=lambda each: (each[1], each[0].text, each[0].place))
        for nodes, group in groupby(missing, key=lambda each: each[1]):
            some = max(1, LOGITS_AT_A_TIME // (4 * self.vocab_size * nodes))
            places = [place for place, _ in group]
            for start in range(0, len(places), some):
                part = places[start : start + some]
                index = torch.tensor([self.starts[each.text] + each.place for each in part], device=self.device)
                found = on_cpu(self.draft(index, nodes))
                for number, place in enumerate(part):
                    self.known[place, nodes] = found.select(torch.tensor([number]))


def first_of(found: Candidates, count: int) -> Candidates:
    """The first candidates of each row."""
    part = slice(count)
    return Candidates(
        found.tokens[:, part], found.parents[:, part], found.depths[:, part], found.scores[:, part], found.free
    )


def on_cpu(found: Candidates) -> Candidates:
    return Candidates(found.tokens.cpu(), found.parents.cpu(), found.depths.cpu(), found.scores.cpu(), found.free)


@dataclass
class Walker:
    """One way along one text. place: where in the answer the root of its next tree stands; taken: tokens that lookup
    knows."""

    way: Way
    asked: int
    number: int
    text: Text
    cut: Cut
    found: Found = field(default_factory=Found)
    place: int = 0
    taken: int = 0
    copied: Candidates | None = None

    def __post_init__(self) -> None:
        self.lookup: LookupSession | None = None
        if self.way.lookup or self.way.copying:
            drafter = PromptLookup(draft_length=max(1, self.way.lookup))
            self.lookup = drafter.begin(torch.nn.Identity(), torch.nn.Identity(), 1)

    @property
    def root(self) -> torch.Tensor:
        return torch.tensor([self.text.answer[self.place]])

    @property
    def done(self) -> bool:
        return self.place >= self.text.last

    def want(self) -> Iterable[tuple[Place, int]]:
        """What the network is asked for at this place, if it is asked at all."""
        if self.lookup is not None:
            end = len(self.text.prompt) + self.place
            new = torch.tensor([self.text.tokens[self.taken : end]])
            self.lookup.extend(new, None, torch.tensor([new.shape[1]]))
            self.taken = end
            self.copied = self.lookup.sure(self.root, self.way.nodes) if self.way.lookup else None
        return [] if self.copied is not None else [(Place(self.number, self.place), self.asked)]

    def step(self, drafts: Drafts) -> None:
        """Follows the tree here, whose drafts are made, and goes on to where the next one stands."""
        candidates = self.copied
        if candidates is None:
            candidates = drafts.known[Place(self.number, self.place), self.asked]
            if self.way.own_size and self.asked > self.way.nodes:
                candidates = first_of(candidates, self.way.nodes)
            if self.way.copying is not None:
                from ctc_drafter.drafters.copying_cpu import with_copied

                assert self.lookup is not None
                text = self.lookup.rows[0].up_to(int(self.root))
                candidates = with_copied(candidates, [text], self.way.nodes, self.way.copying.draft_length, 0.0)
        self.place += self.found.step(self.cut(self.root, candidates), self.text, self.place) + 1


@torch.inference_mode()
def walk_network(target: Target, ways: Mapping[Any, Way], texts: Sequence[Text]) -> dict[Any, list[Found]]:
    """What each way, all of one network, would have done with each text."""
    network = next(iter(ways.values())).network
    asked = nodes_asked(ways.values(), network.best_first(network.prepared(*target.draft_modules)))
    walkers = {
        name: [Walker(way, asked[way], number, text, cut_of(way.size, way.nodes)) for number, text in enumerate(texts)]
        for name, way in ways.items()
    }
    going = [walker for each in walkers.values() for walker in each if not walker.done]
    drafts = Drafts(target, network, texts) if going else None
    while going:
        assert drafts is not None
        drafts.make(want for walker in going for want in walker.want())
        for walker in going:
            walker.step(drafts)
        going = [walker for walker in going if not walker.done]
    return {name: [walker.found for walker in each] for name, each in walkers.items()}
