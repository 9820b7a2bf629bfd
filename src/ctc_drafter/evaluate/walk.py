"""Tokens per step without timing: drafts are checked against the answers of plain decoding (`bench --tokens-only`).

Greedy decoding writes one text whatever is drafted, so what a step accepts is known once the text is: the drafted path
that agrees with it. The target writes and reads each text once, several of them together; drafts are made where
decoding would stop, once for all who need them there (`places.py`). A comparison of drafters then costs their drafts
alone. What is found is decoding's, but for rounding: the target computes features of a whole text here. Drafters that
are no trained network have their sessions led along the texts, as decoding would lead them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ctc_drafter.decode.generate import Generation, plain_generate
from ctc_drafter.decode.sampling import ARGMAX, Sampler
from ctc_drafter.decode.stats import Stats
from ctc_drafter.drafters.base import Drafter
from ctc_drafter.drafters.copying import Copying
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.drafters.trainable import network_of
from ctc_drafter.evaluate.methods import POOL, Calibration, Contender, Decoding
from ctc_drafter.evaluate.places import Cut, Found, Size, Text, Way, cut_of, network_key, walk_network, way_of
from ctc_drafter.evaluate.results import CHAIN, PLAIN, Key
from ctc_drafter.target.model import Target
from ctc_drafter.types import TokenTree, UserError

Prompt = tuple[int, ...]
TOGETHER = 8  # prompts whose answers are written and walked together, at least: a step costs little more than for one


def read(target: Target, prompt: Sequence[int], answer: Sequence[int], layers: Sequence[int]) -> Text:
    """The target's features of a prompt and its answer, in one forward."""
    own = tuple(sorted(set(layers)))
    tokens = torch.tensor([[*prompt, *answer]], device=target.device)
    return Text(list(prompt), list(answer), own, target.hidden_features(tokens, own)[0] if own else None)


@torch.inference_mode()
def walk(
    target: Target, drafter: Drafter, texts: Sequence[Text], cuts: Mapping[Size, Cut], nodes: int
) -> list[dict[Size, Found]]:
    """Leads a session along texts; each of `cuts` makes trees of the same drafts, of up to `nodes` nodes.

    Every cut has its own pace in every text: its next draft is looked at where its last step ended. Places where no cut
    stops are taken in without a draft. The calibration leaves out trees that reach beyond the end of the answer, of
    which nobody knows what the target would have said.
    """
    session = drafter.begin(*target.draft_modules, len(texts))
    rows = [Row(text, dict.fromkeys(cuts, 0), {size: Found() for size in cuts}) for text in texts]
    going = list(rows)
    while True:
        staying = [index for index, row in enumerate(going) if row.place < row.text.last]
        if not staying:
            return [row.found for row in rows]
        if len(staying) < len(going) and any(row.taken for row in going):
            session.select(torch.tensor(staying, device=target.device))
        elif len(staying) < len(going):  # answers of one token: a session keeps no rows before it has read any
            session = drafter.begin(*target.draft_modules, len(staying))
        going = [going[index] for index in staying]
        session.extend(*committed(going, drafter.feature_layers, target.device))
        root = torch.tensor([row.text.answer[row.place] for row in going], device=target.device)
        candidates = session.propose(root, nodes, 0.0)
        trees = {size: cut(root, candidates) for size, cut in cuts.items()}
        for index, row in enumerate(going):
            row.step({size: trees[size].rows(index, index + 1) for size in row.here})


@dataclass
class Row:
    """A text on the way. stops: where in the answer the root of each size's next tree stands. taken: tokens of prompt
    and answer that the session knows."""

    text: Text
    stops: dict[Size, int]
    found: dict[Size, Found]
    taken: int = 0

    @property
    def place(self) -> int:
        """Where the next draft is needed."""
        return min(self.stops.values())

    @property
    def here(self) -> list[Size]:
        return [size for size, stop in self.stops.items() if stop == self.place]

    def step(self, trees: Mapping[Size, TokenTree]) -> None:
        """Follows trees, of one row each, whose root stands at `place`."""
        place = self.place
        for size, tree in trees.items():
            self.stops[size] += self.found[size].step(tree, self.text, place) + 1


def committed(
    rows: Sequence[Row], layers: Sequence[int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """What enters the cache before each row's next root, the arguments of `DraftSession.extend`; counts it as taken."""
    tokens, features = [], []
    for row in rows:
        end = len(row.text.prompt) + row.place
        tokens.append(torch.tensor([*row.text.prompt, *row.text.answer][row.taken : end], device=device))
        features.append(row.text.features_of(layers, row.taken, end))
        row.taken = end
    counts = torch.tensor([len(each) for each in tokens], device=device)
    known = [each for each in features if each is not None]
    return pad_sequence(tokens, True), pad_sequence(known, True) if known else None, counts


def groups(drafter: Drafter, texts: Sequence[Text]) -> list[list[Text]]:
    """Texts that are walked together: all of them, or each alone where a draft depends on the others, as prompt lookup
    does, which spares the network only where it is sure of every row."""
    looking = getattr(getattr(drafter, "config", drafter), "lookup_length", 0) or isinstance(drafter, PromptLookup)
    return [[text] for text in texts] if looking else [list(texts)]


@dataclass(frozen=True)
class Walking(Decoding):
    """`Decoding` whose methods walk along plain decoding's answers. Only greedy ones, and nothing has a speed.

    sizes: all that will be asked for, since one draft serves them. layers: all that any drafter will read. Raises
    `UserError` for targets some of whose steps have no trees: chains with replay, and texts that are read anew.
    """

    sizes: tuple[Size, ...] = ()
    layers: tuple[int, ...] = ()
    _answers: dict[Prompt, list[int]] = field(default_factory=dict)
    _texts: dict[Prompt, Text] = field(default_factory=dict)
    _found: dict[tuple[Key, Prompt], Found] = field(default_factory=dict)
    _ways: dict[Any, dict[Key, Way]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.target.chain is not None or self.target.reread_at is not None:
            kind = type(self.target.model).__name__
            raise UserError(f"--tokens-only counts steps of trees, which {kind} does not always follow; leave it out")

    def plain(self) -> Contender:
        def run(prompts: list[list[int]], _timed: bool, _: Calibration | None) -> Generation:
            answers = self.answers(prompts)
            return Generation(answers, Stats(), [[0] * (len(answer) - 1) for answer in answers])

        return Contender(PLAIN, None, run)

    def of_size(self, method: str, drafter: Drafter, nodes: Size, sampler: Sampler = ARGMAX) -> Contender:
        """Raises `UserError` for a sampler: what it would write is not known."""
        if sampler is not ARGMAX:
            raise UserError("--tokens-only is for greedy decoding; leave out variants with another acceptance")
        key, way = (method, nodes), way_of(drafter, nodes)
        if way is None:
            walk_all = self._session_walk(method, drafter, nodes)
        else:
            together = self._ways.setdefault(network_key(way.network), {})
            together[key] = way

            def walk_all(texts: Sequence[Text]) -> Mapping[Key, Sequence[Found]]:
                return walk_network(self.target, together, texts)

        def run(prompts: list[list[int]], _timed: bool, calibration: Calibration | None) -> Generation:
            missing = [prompt for prompt in prompts if (key, tuple(prompt)) not in self._found]
            for name, founds in walk_all(self.texts(missing)).items() if missing else ():
                self._found.update({(name, tuple(p)): found for p, found in zip(missing, founds, strict=True)})
            walked = [self._found[key, tuple(prompt)] for prompt in prompts]
            for found in walked if calibration is not None else ():
                assert calibration is not None
                calibration.include(found.calibration)
            return Generation(self.answers(prompts), Stats(), [found.accepted for found in walked])

        return Contender(method, nodes, run)

    def _session_walk(
        self, method: str, drafter: Drafter, nodes: Size
    ) -> Callable[[Sequence[Text]], Mapping[Key, Sequence[Found]]]:
        """Walks by the drafter's own session, for all sizes that may share its drafts."""
        chain = nodes == CHAIN
        # Among copies every size has drafts of its own: what the network did not propose depends on what it did.
        alike = chain or not isinstance(drafter, Copying)
        sizes = [size for size in self.sizes if (size == CHAIN) == chain] if alike else [nodes]
        largest = max([POOL if chain else 1, *(int(size) for size in sizes if size != CHAIN)])
        asked, cuts = network_of(drafter) if chain else drafter, {size: cut_of(size, largest) for size in sizes}

        def walk_all(texts: Sequence[Text]) -> Mapping[Key, Sequence[Found]]:
            walked = [
                found for group in groups(asked, texts) for found in walk(self.target, asked, group, cuts, largest)
            ]
            return {(method, size): [found[size] for found in walked] for size in sizes}

        return walk_all

    def answers(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """What plain decoding writes, once for the whole run."""
        keys = [tuple(prompt) for prompt in prompts]
        missing = [key for key in dict.fromkeys(keys) if key not in self._answers]
        if missing:
            found = plain_generate(self.target, missing, max_new_tokens=self.max_new_tokens, eos=self.eos).tokens
            self._answers.update(zip(missing, found, strict=True))
        return [self._answers[key] for key in keys]

    def texts(self, prompts: Sequence[Sequence[int]]) -> list[Text]:
        """The prompts with plain decoding's answers; those of one batch are remembered, since features take memory."""
        keys = [tuple(prompt) for prompt in prompts]
        if any(key not in self._texts for key in keys):
            self._texts.clear()
            for key, answer in zip(keys, self.answers(prompts), strict=True):
                self._texts[key] = read(self.target, key, answer, self.layers)
        return [self._texts[key] for key in keys]
