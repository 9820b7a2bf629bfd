"""Tokens per step without timing: drafts are checked against the answers of plain decoding (`bench --tokens-only`).

Greedy decoding writes one text whatever is drafted, so what a step accepts is known once the text is: the drafted path
that agrees with it. The target reads each text once; a drafter's session is led along it as decoding would lead it,
and one draft serves trees of all sizes, since the best n prefixes are the first n (not so among the copies that a
drafter was given, where each size has drafts of its own). A comparison of drafters then costs their drafts alone. What
is found is decoding's, but for rounding: the target computes features of a whole text here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence

from ctc_drafter.decode.generate import Generation, plain_generate
from ctc_drafter.decode.sampling import ARGMAX, Sampler
from ctc_drafter.decode.stats import Stats
from ctc_drafter.decode.tree import best_chain, build_tree
from ctc_drafter.decode.verify import follow
from ctc_drafter.drafters.base import Drafter
from ctc_drafter.drafters.copying import Copying
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.drafters.trainable import network_of
from ctc_drafter.evaluate.methods import POOL, Calibration, Contender, Decoding
from ctc_drafter.evaluate.results import CHAIN, PLAIN
from ctc_drafter.target.model import Target
from ctc_drafter.types import Candidates, TokenTree, UserError

Size = int | str
Cut = Callable[[torch.Tensor, Candidates], TokenTree]  # the tree of a draft after root int64 [1]


@dataclass(frozen=True)
class Text:
    """A prompt, the answer that plain decoding wrote, and the target's features `[T, K]` of both."""

    prompt: list[int]
    answer: list[int]
    layers: tuple[int, ...]
    features: torch.Tensor | None

    def features_of(self, layers: Sequence[int], begin: int, end: int) -> torch.Tensor | None:
        """`[end - begin, K]` of these layers alone, in their order."""
        if not layers or self.features is None:
            return None
        width = self.features.shape[-1] // len(self.layers)
        parts = [self.layers.index(layer) * width for layer in layers]
        return torch.cat([self.features[begin:end, at : at + width] for at in parts], -1)


@dataclass
class Found:
    """What trees of one size would have done with a text. accepted: drafted tokens that each step accepted."""

    accepted: list[int] = field(default_factory=list)
    calibration: Calibration = field(default_factory=Calibration)


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
    rows = [Row(text, dict.fromkeys(cuts, 0), {size: Found() for size in cuts}, nodes) for text in texts]
    going = list(rows)
    while True:
        staying = [index for index, row in enumerate(going) if row.place < len(row.text.answer) - 1]
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
    nodes: int
    taken: int = 0

    def __post_init__(self) -> None:
        # -1 is no token: what is drafted past the end of the answer is not accepted.
        self.truth = torch.tensor([[*self.text.answer, *[-1] * (self.nodes + 1)]])

    @property
    def place(self) -> int:
        """Where the next draft is needed."""
        return min(self.stops.values())

    @property
    def here(self) -> list[Size]:
        return [size for size, stop in self.stops.items() if stop == self.place]

    def step(self, trees: Mapping[Size, TokenTree]) -> None:
        """Follows trees, of one row each, whose root stands at `place`."""
        place, end = self.place, len(self.text.answer)
        for size, tree in trees.items():
            # After a node of depth d comes what stands d + 1 further.
            wanted = self.truth[:, place + 1 :].to(tree.tokens.device).gather(1, tree.depths)
            count = int(follow(tree, wanted).counts)
            self.found[size].accepted.append(count)
            if place + int(tree.depths.amax()) < end:
                self.found[size].calibration.add(tree, wanted)
            self.stops[size] += count + 1


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


def cut_of(size: Size, nodes: int) -> Cut:
    """The tree of a draft that results call by this size."""
    if size == CHAIN:
        return lambda root, found: build_tree(root, best_chain(found) if found.tokens.shape[1] else found, nodes)
    return lambda root, found: build_tree(root, found, int(size))


@dataclass(frozen=True)
class Walking(Decoding):
    """`Decoding` whose methods walk along plain decoding's answers. Only greedy ones, and nothing has a speed.

    sizes: all that will be asked for, since one draft serves them. layers: all that any drafter will read. Raises
    `UserError` for targets some of whose steps have no trees: chains with replay, and texts that are read anew.
    """

    sizes: tuple[Size, ...] = ()
    layers: tuple[int, ...] = ()
    _texts: dict[tuple[int, ...], Text] = field(default_factory=dict)
    _found: dict[tuple[str, tuple[Size, ...]], tuple[list[list[int]], list[dict[Size, Found]]]] = field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        if self.target.chain is not None or self.target.reread_at is not None:
            kind = type(self.target.model).__name__
            raise UserError(f"--tokens-only counts steps of trees, which {kind} does not always follow; leave it out")

    def plain(self) -> Contender:
        def run(prompts: list[list[int]], _timed: bool, _: Calibration | None) -> Generation:
            texts = self.texts(prompts)
            return Generation([text.answer for text in texts], Stats(), [[0] * (len(t.answer) - 1) for t in texts])

        return Contender(PLAIN, None, run)

    def of_size(self, method: str, drafter: Drafter, nodes: Size, sampler: Sampler = ARGMAX) -> Contender:
        """Raises `UserError` for a sampler: what it would write is not known."""
        if sampler is not ARGMAX:
            raise UserError("--tokens-only is for greedy decoding; leave out variants with another acceptance")
        chain = nodes == CHAIN
        # Among copies every size has drafts of its own: what the network did not propose depends on what it did.
        alike = chain or not isinstance(drafter, Copying)
        sizes = [size for size in self.sizes if (size == CHAIN) == chain] if alike else [nodes]
        largest = max([POOL if chain else 1, *(int(size) for size in sizes if size != CHAIN)])
        asked = network_of(drafter) if chain else drafter

        def run(prompts: list[list[int]], _timed: bool, calibration: Calibration | None) -> Generation:
            key = method, tuple(sizes)
            if self._found.get(key, ([], []))[0] != prompts:
                cuts = {size: cut_of(size, largest) for size in sizes}
                walked = [
                    found
                    for group in groups(asked, self.texts(prompts))
                    for found in walk(self.target, asked, group, cuts, largest)
                ]
                self._found[key] = prompts, walked
            found = [each[nodes] for each in self._found[key][1]]
            for each in found if calibration is not None else ():
                assert calibration is not None
                calibration.include(each.calibration)
            answers = [text.answer for text in self.texts(prompts)]
            return Generation(answers, Stats(), [each.accepted for each in found])

        return Contender(method, nodes, run)

    def texts(self, prompts: Sequence[Sequence[int]]) -> list[Text]:
        """The prompts with plain decoding's answers; those of one batch are remembered."""
        keys = [tuple(prompt) for prompt in prompts]
        if any(key not in self._texts for key in keys):
            self._texts.clear()
            answers = plain_generate(self.target, prompts, max_new_tokens=self.max_new_tokens, eos=self.eos).tokens
            for key, answer in zip(keys, answers, strict=True):
                self._texts[key] = read(self.target, key, answer, self.layers)
        return [self._texts[key] for key in keys]
