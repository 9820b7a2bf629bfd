"""`bench --tokens-only`: what walking along plain decoding's answers says is what decoding says."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from ctc_drafter.cli import main
from ctc_drafter.decode.generate import Generation, plain_generate
from ctc_drafter.decode.sampling import ARGMAX
from ctc_drafter.drafters.base import refuse_call
from ctc_drafter.drafters.copying import with_copies
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.drafters.registry import fresh_drafter
from ctc_drafter.drafters.trainable import TrainableDrafter
from ctc_drafter.evaluate.bench import BenchSettings, Entry, bench, shortened
from ctc_drafter.evaluate.methods import POOL, Calibration
from ctc_drafter.evaluate.places import (
    Drafts,
    Place,
    Text,
    Walker,
    cut_of,
    first_of,
    network_key,
    nodes_asked,
    walk_network,
    way_of,
)
from ctc_drafter.evaluate.tasks import Prompt, Task
from ctc_drafter.evaluate.typical import Typical
from ctc_drafter.evaluate.walk import Walking, read, walk
from ctc_drafter.evaluate.who_copies import given_copies
from ctc_drafter.load import load_drafter, load_target
from ctc_drafter.target.chain_test import Chain
from ctc_drafter.target.model import Target
from ctc_drafter.types import Candidates, UserError
from tiny_models import tiny_llama

TASKS = [
    Task("chat", (Prompt("chat/0", "a", ("Write a poem about the sea.", "Again, shorter.")),)),
    Task("maths", (Prompt("m/0", "b", ("What is 3 times 4?",)), Prompt("m/1", "b", ("Add 2 and 5.",)))),
]
METHODS = ("eagle", "hydra", "medusa", "dspark", "dflash2", "ctc-paper")


def measured(names: tuple[str, ...], tokens_only: bool, **settings: Any) -> dict[str, Any]:
    target, tokenizer = load_target("tiny", "float32", "cpu")
    entries = {"prompt_lookup": Entry(PromptLookup(), {})}
    for name in names:
        made = load_drafter("tiny", target, tokenizer) if name == "ctc" else fresh_drafter(target, tokenizer, 0, name)
        entries[name] = Entry(made.eval(), {})
    usual: dict[str, Any] = {"sizes": ("chain", 4, 16), "max_new_tokens": 10, "watched": 0, "tokens_only": tokens_only}
    chosen = BenchSettings(**usual | settings)
    return bench(target, tokenizer, given_copies(entries, ("none", "all")), TASKS, chosen, meta={})


def counted(result: dict[str, Any]) -> list[tuple[Any, ...]]:
    names = ("task", "method", "nodes", "prompts", "tokens", "steps", "beta")
    return [tuple(row[name] for name in names) for row in result["rows"]]


@pytest.mark.parametrize("names", [("ctc",), pytest.param(METHODS, marks=pytest.mark.slow)])
def test_tokens_and_steps_are_those_of_decoding(names: tuple[str, ...]) -> None:
    walked, decoded = measured(names, True), measured(names, False)
    assert counted(walked) == counted(decoded)
    assert max(row["beta"] for row in decoded["rows"] if row["beta"]) > 2  # else nothing was accepted
    assert all(row["identical"] == row["compared"] == row["prompts"] for row in decoded["rows"])
    assert {(row["identical"], row["compared"]) for row in walked["rows"]} == {(0, 0)}  # it would be so by definition
    assert {row["gamma"] for row in walked["rows"]} == {None}
    assert {row["tokens_per_s"] for row in walked["rows"]} == {None}
    assert not any(row["stages_ms"] for row in walked["rows"])
    assert walked["meta"]["tokens_only"]
    assert not decoded["meta"]["tokens_only"]


@pytest.mark.slow
def test_rows_of_a_batch_are_walked_as_if_alone() -> None:
    """Copies included, which decoding of a batch uses only where all rows have some."""
    assert counted(measured(("ctc", "eagle"), True, batch_size=2)) == counted(measured(("ctc", "eagle"), True))


class Scripted:
    """Proposes 5, 6 and then 9 at every place, and writes down what it is asked and told."""

    feature_layers = (1, 0)
    __call__ = refuse_call

    def __init__(self) -> None:
        self.text: list[int] = []
        self.roots: list[int] = []
        self.features: list[torch.Tensor] = []

    def begin(self, embed: object, head: object, batch_size: int) -> "Scripted":
        return self

    def extend(self, tokens: torch.Tensor, features: torch.Tensor, counts: torch.Tensor) -> None:
        assert counts.tolist() == [tokens.shape[1]] == [features.shape[1]]
        self.text += tokens[0].tolist()
        self.features.append(features)

    def propose(self, root: torch.Tensor, nodes: int, min_probability: float) -> Candidates:
        self.roots.append(int(root))
        scores = torch.tensor([[0.9, 0.6, 0.3]]).log()
        return Candidates(torch.tensor([[5, 6, 9]]), torch.tensor([[-1, 0, 1]]), torch.tensor([[1, 2, 3]]), scores)


def test_the_worked_example() -> None:
    """Prompt 1 2, answer 4 5 6 7 5 8 3: a tree of two nodes at 4 accepts 5 6 and brings 7; at 7 it accepts 5 and brings
    8; at 8 nothing, and brings 3, the end. A tree of one node accepts 5 at 4, so it stops at 6, where it accepts
    nothing and brings 7."""
    target, drafter = Target.wrap(tiny_llama()), Scripted()
    answer = [4, 5, 6, 7, 5, 8, 3]
    features = torch.arange(9 * 4.0).view(9, 4)
    text = Text([1, 2], answer, (0, 1), features)
    found = walk(target, drafter, [text], {size: cut_of(size, 3) for size in (1, 2)}, 3)[0]
    assert {size: each.accepted for size, each in found.items()} == {2: [2, 1, 0], 1: [1, 0, 1, 0]}
    assert drafter.roots == [4, 6, 7, 8]  # nobody stops at 5
    assert drafter.text == [1, 2, 4, 5, 6, 7, 5]  # what has entered the cache before the last root
    swapped = features[..., [2, 3, 0, 1]]  # the drafter asked for layer 1, then 0
    assert torch.equal(torch.cat(drafter.features, 1)[0], swapped[:7])
    # Of the tree of one node: .9 four times, of which two were accepted.
    assert sum(found[1].calibration.nodes) == 4
    assert sum(found[1].calibration.accepted) == 2
    assert sum(found[1].calibration.predicted) == pytest.approx(4 * 0.9)
    # The tree of two nodes at 8 reaches beyond the answer: it does not count.
    assert sum(found[2].calibration.nodes) == 4
    assert sum(found[2].calibration.accepted) == 3


def hydra_on_a_tiny_target() -> tuple[Target, TrainableDrafter, tuple[int, ...]]:
    target = Target.wrap(tiny_llama())
    drafter = fresh_drafter(target, None, 0, "hydra").eval()
    return target, drafter, drafter.feature_layers


def test_answers_are_written_once_and_places_drafted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all sizes, with and without copies, and when calibration asks again: but among copies each size is asked
    for drafts of its own."""
    target, drafter, layers = hydra_on_a_tiny_target()
    written, asked = list[tuple[int, ...]](), Counter[int]()

    def plain(target: Target, prompts: list[tuple[int, ...]], **options: Any) -> Generation:
        written.extend(prompts)
        return plain_generate(target, prompts, **options)

    def candidates(states: torch.Tensor, root: torch.Tensor, heads: object, nodes: int) -> Candidates:
        asked[nodes] += len(root)
        return type(drafter).candidates(drafter, states, root, heads, nodes)

    monkeypatch.setattr("ctc_drafter.evaluate.walk.plain_generate", plain)
    monkeypatch.setattr(drafter, "candidates", candidates)
    sizes = ("chain", 4, 16)
    walking = Walking(target, frozenset(), 12, sizes, layers)
    ways = [
        walking.of_size(name, each, size)
        for name, each in (("a", drafter), ("b", with_copies(drafter)))
        for size in sizes
    ]
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6]]
    calibration = Calibration()
    first = [way.run(prompts, False, calibration).accepted for way in (*ways, walking.plain())]
    walking.texts([[2, 7, 1]])  # another batch
    assert [way.run(prompts, False, None).accepted for way in (*ways, walking.plain())] == first
    assert sum(calibration.nodes) > 0
    assert written == [*map(tuple, prompts), (2, 7, 1)]
    assert set(asked) == {POOL, 4, 16}
    assert max(asked.values()) <= 2 * 11  # places of both answers that have a next token


def test_what_networks_are_asked_for() -> None:
    _, drafter, _ = hydra_on_a_tiny_target()
    copying = with_copies(drafter)
    small, large, chain = (way_of(drafter, size) for size in (4, 16, "chain"))
    among_copies, copied_chain = way_of(copying, 4), way_of(copying, "chain")
    assert small is not None is not large
    assert chain is not None
    assert among_copies is not None is not copied_chain
    assert nodes_asked([small, large], False) == {small: 16, large: 16}
    assert nodes_asked([small, chain], False) == {small: POOL, chain: POOL}
    huge = replace(small, size=2 * POOL)
    assert nodes_asked([small, huge, chain], False) == {
        small: 2 * POOL,
        huge: 2 * POOL,
        chain: POOL,
    }  # others would be chosen
    assert nodes_asked([small, among_copies, copied_chain], False) == {small: 4, among_copies: 4, copied_chain: POOL}
    assert set(nodes_asked([huge, chain, among_copies, copied_chain], True).values()) == {2 * POOL}
    assert among_copies.lookup
    assert not copied_chain.lookup  # chains ask the network
    assert network_key(small.network) == network_key(copied_chain.network)
    assert network_key(small.network) != network_key(shortened(drafter, 2))
    assert way_of(PromptLookup(), 4) is way_of(Scripted(), 4) is None


@pytest.mark.parametrize(("name", "expected"), [("ctc", True), ("dspark", True), ("dflash", True), ("hydra", False)])
@torch.inference_mode()
def test_drafts_that_are_the_first_of_more(name: str, expected: bool) -> None:
    target = Target.wrap(tiny_llama())
    drafter = fresh_drafter(target, None, 0, name, **{"copies": 0} if name == "ctc" else {}).eval()
    assert drafter.best_first(drafter.prepared(*target.draft_modules)) is expected
    text = read(target, [1, 2, 3], [4, 5, 6, 7], drafter.feature_layers)
    drafts, places = Drafts(target, drafter, [text]), [Place(0, place) for place in range(text.last)]
    drafts.make((place, nodes) for place in places for nodes in (5, 16))
    few = [drafts.known[place, 5] for place in places]
    first = [first_of(drafts.known[place, 16], 5) for place in places]
    for name in ("tokens", "parents", "depths", "scores") if expected else ():
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for one, other in zip(few, first, strict=True))


def test_each_size_decides_whether_copies_do() -> None:
    """As in decoding, where a tree of one node is never expected to accept `ENOUGH`."""
    target = Target.wrap(tiny_llama())
    drafter = fresh_drafter(target, None, 0, "ctc").eval()
    text = read(target, [*range(1, 9), *range(1, 9), 1], [2, 3, 4, 5, 6, 7], drafter.feature_layers)
    wants = {}
    for size in (1, 16, "chain"):
        way = way_of(drafter, size)
        assert way
        wants[size] = [nodes for _, nodes in Walker(way, 64, 0, text, cut_of(size, 64)).want()]
    assert wants == {1: [64], 16: [], "chain": [64]}


def test_answers_of_one_token_have_no_drafts() -> None:
    target, drafter, layers = hydra_on_a_tiny_target()
    texts = [read(target, [1, 2], answer, layers) for answer in ([3], [4, 5], [6])]
    way = way_of(drafter, 4)
    assert way
    assert [len(found.accepted) for found in walk_network(target, {"a": way}, texts)["a"]] == [0, 1, 0]
    assert [found.accepted for found in walk_network(target, {"a": way}, texts[:1])["a"]] == [[]]


def test_only_greedy_methods() -> None:
    walking = Walking(Target.wrap(tiny_llama()), frozenset(), 8, (4,), ())
    with pytest.raises(UserError, match="greedy"):
        walking.of_size("ctc", PromptLookup(), 4, Typical())
    assert walking.of_size("ctc", PromptLookup(), 4, ARGMAX).key == ("ctc", 4)


def test_targets_that_follow_chains_are_refused() -> None:
    """Their steps may rest without a draft, and trees are cut to chains: counts would not be decoding's."""
    target = Target(tiny_llama(), chain=Chain(positions=True, together=True, stepped=False))
    with pytest.raises(UserError, match="--tokens-only counts steps of trees, which LlamaForCausalLM does not"):
        Walking(target, frozenset(), 8, (4,), ())


def test_nothing_is_timed_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--tokens-only", "--also", "hf"]) != 0
    assert "--tokens-only times nothing" in capsys.readouterr().err
