"""Many threads on one model and one drafter: each call gives what it gives alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch.utils.hooks import RemovableHandle

import helpers
from ctc_drafter import Speculator, speculate
from ctc_drafter.decode.generate import plain_generate
from ctc_drafter.decode.sampling import Sampled, warpers
from ctc_drafter.drafters.baselines.heads import MedusaDrafter
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.target.features import captured
from ctc_drafter.target.model import Target

THREADS, CALLS = 4, 20
LAYERS = (0, 2)
Call = Callable[[], object]


@pytest.fixture(autouse=True)
def eager_switching() -> Iterator[None]:
    """Threads that take turns often meet in more places."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def side_by_side(work: Sequence[Sequence[Call]]) -> list[list[object]]:
    """What each thread's calls gave, an exception where one was raised; the threads begin every call together."""
    barrier = threading.Barrier(len(work), timeout=60)
    found: list[list[object]] = [[] for _ in work]

    def run(place: int) -> None:
        for call in work[place]:
            barrier.wait()
            try:
                found[place].append(call())
            except Exception as error:
                found[place].append(error)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def prompt_of(thread: int, call: int) -> list[int]:
    """Lengths differ between threads and calls, and texts repeat themselves, so that there is something to copy."""
    phrase = [(7 * thread + 3 * call + 5 * place) % helpers.VOCABULARY for place in range(3 + thread)]
    return (phrase * 8)[: 5 + (5 * thread + 3 * call) % 17]


@pytest.fixture(scope="module")
def target() -> Target:
    return helpers.tiny_target()


def shared_drafter(name: str, target: Target) -> object:
    if name == "prompt lookup":
        return PromptLookup()
    if name == "ctc":
        return helpers.tiny_drafter(target, copies=4, carry=True, lookup_length=6)
    torch.manual_seed(1)
    return MedusaDrafter.for_target(target.config, draft_length=3).eval()


class Calls:
    """The calls on one shared model, and what each gives alone by another way."""

    def __init__(self, target: Target, drafter: object):
        self.target, self.model = target, target.model
        self.decode = speculate(drafter, nodes=6, min_probability=0.0)
        self.fast = Speculator(target.model, drafter, nodes=6, min_probability=0.0)

    def generated(self, prompt: list[int], count: int, **options: object) -> list[int]:
        row = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(row), "eos_token_id": None, "pad_token_id": 0, **options}
        return self.model.generate(row, max_new_tokens=count, **options)[0, len(prompt) :].tolist()

    def stock(self, prompt: list[int], count: int) -> list[int]:
        return self.generated(prompt, count, do_sample=False)

    def drafted(self, prompt: list[int], count: int) -> list[int]:
        return self.generated(prompt, count, do_sample=False, custom_generate=self.decode)

    def by_object(self, prompt: list[int], count: int) -> list[int]:
        row = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(row), "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
        found = self.fast.generate(row, max_new_tokens=count, **options)[0, len(prompt) :].tolist()
        assert self.fast.stats.tokens == count, "the stats of this thread's call"
        return found

    def sampled(self, prompt: list[int], count: int) -> list[int]:
        options = {"do_sample": True, "temperature": 0.8, "top_k": 0, "seeds": [sum(prompt)]}
        return self.generated(prompt, count, custom_generate=self.decode, **options)

    def plain(self, prompt: list[int], count: int) -> list[int]:
        return plain_generate(self.target, [prompt], max_new_tokens=count).tokens[0]

    def plain_sampled(self, prompt: list[int], count: int) -> list[int]:
        sampler = Sampled([sum(prompt)], warpers(temperature=0.8))
        return plain_generate(self.target, [prompt], max_new_tokens=count, sampler=sampler).tokens[0]

    def features(self, prompt: list[int], _count: int) -> list[float]:
        features, last = self.target.hidden_states(torch.tensor([prompt]), LAYERS)
        return torch.cat([features, last], -1).flatten().tolist()

    @torch.no_grad()
    def hidden(self, prompt: list[int], _count: int) -> list[float]:
        """`features` as transformers hands them out."""
        states = self.model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        return torch.cat([*(states[layer + 1] for layer in LAYERS[:1]), *self.last(prompt)], -1).flatten().tolist()

    def last(self, prompt: list[int]) -> list[torch.Tensor]:
        """The last block's output, which transformers hands out only behind the norm, and behind it."""
        with torch.no_grad():
            before: list[torch.Tensor] = []
            norm = self.model.model.norm
            handle = norm.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
            after = self.model.model(torch.tensor([prompt])).last_hidden_state
            handle.remove()
        return [before[0], after]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ctc", "medusa", "prompt lookup"])
def test_eighty_calls_of_four_threads_give_what_each_gives_alone(target: Target, name: str) -> None:
    """Two threads draft, greedily and sampled; beside them stock `generate`, plain decoding and training's features."""
    calls = Calls(target, shared_drafter(name, target))
    turns = [
        [(calls.drafted, calls.stock), (calls.sampled, calls.plain_sampled)],
        [(calls.by_object, calls.stock)],
        [(calls.drafted, calls.stock), (calls.stock, calls.stock), (calls.plain, calls.stock)],
        [(calls.features, calls.hidden), (calls.sampled, calls.plain_sampled), (calls.plain, calls.stock)],
    ]
    work: list[list[Call]] = []
    expected: list[list[object]] = []
    for thread in range(THREADS):
        work.append([])
        expected.append([])
        for call in range(CALLS):
            concurrent, alone = turns[thread][call % len(turns[thread])]
            arguments = prompt_of(thread, call), 4 + (thread + call) % 5
            work[-1].append(lambda run=concurrent, given=arguments: run(*given))
            expected[-1].append(alone(*arguments))
    found = side_by_side(work)
    wrong = [(t, c, found[t][c]) for t in range(THREADS) for c in range(CALLS) if found[t][c] != expected[t][c]]
    wrong = [each for each in wrong if not close(each[2], expected[each[0]][each[1]])]
    assert wrong == []


def close(found: object, expected: object) -> bool:
    """Features may be rounded otherwise; tokens may not."""
    if not isinstance(found, list) or not isinstance(found[0], float) or len(found) != len(expected):
        return False
    return torch.allclose(torch.tensor(found), torch.tensor(expected), atol=1e-4)


def test_what_a_thread_captures_is_its_own(target: Target) -> None:
    """Also where one opens a capture while another one's forward is on its way, and where captures are nested."""
    opened, done = threading.Event(), threading.Event()
    tokens = torch.tensor([[1, 2, 3, 4, 5]])

    def other() -> None:
        opened.wait(60)
        target.model(tokens[:, :2])
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with torch.no_grad(), captured(target.model, LAYERS) as outer, captured(target.model, LAYERS[:1]) as inner:
        opened.set()
        assert done.wait(60)
        assert (len(outer), len(inner)) == (0, 0)
        target.model(tokens)
    thread.join()
    assert {layer: states.shape[1] for layer, states in outer.items()} == dict.fromkeys(LAYERS, 5)
    assert torch.equal(inner[0], outer[0])


def test_no_hook_is_lost_or_left_behind(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch counts its hooks' ids without a lock: two threads at once may get the same, and one hook is gone."""
    plain, pause = RemovableHandle.__init__, threading.Event()

    def slowly(self: RemovableHandle, *args: object, **named: object) -> None:
        number = RemovableHandle.next_id
        pause.wait(0.002)
        plain(self, *args, **named)
        self.id, RemovableHandle.next_id = number, number + 1

    block = target.model.model.layers[0]
    before = list(block._forward_hooks)
    monkeypatch.setattr(RemovableHandle, "__init__", slowly)

    def open_and_run() -> int:
        with torch.no_grad(), captured(target.model, (0,)) as outputs:
            target.model(torch.tensor([[1, 2, 3]]))
        return len(outputs)

    found = side_by_side([[open_and_run] * 10] * THREADS)
    assert found == [[1] * 10] * THREADS
    assert list(block._forward_hooks) == before


def test_one_drafter_serves_two_targets_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a drafter makes of a target's weights is cached; a thread must not be handed the other target's."""
    targets = [helpers.tiny_target(seed) for seed in (0, 5)]
    drafter, pause = helpers.tiny_drafter(targets[0]), threading.Event()

    def slowly(self: torch.nn.Module, name: str, value: object) -> None:
        torch.nn.Module.__setattr__(self, name, value)
        pause.wait(0.001)

    monkeypatch.setattr(type(drafter), "__setattr__", slowly, raising=False)
    work = [[lambda each=targets[t % 2]: drafter.prepared(each.embed, each.head).embed] * 10 for t in range(THREADS)]
    found = side_by_side(work)
    assert [t for t in range(THREADS) for each in found[t] if each is not targets[t % 2].embed] == []


def test_a_drafter_is_made_ready_once_for_all_threads(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers are replaced by packed ones meanwhile: a second thread would find some of each kind."""
    drafter, pause = shared_drafter("medusa", target), threading.Event()
    prepare = type(drafter).prepare

    def slowly(self: MedusaDrafter, *modules: torch.nn.Module) -> object:
        pause.wait(0.01)
        return prepare(self, *modules)

    monkeypatch.setattr(type(drafter), "prepare", slowly)
    work = [[lambda: drafter.prepared(target.embed, target.head)]] * THREADS
    found = [each for calls in side_by_side(work) for each in calls]
    assert [each for each in found if each is not found[0]] == []
