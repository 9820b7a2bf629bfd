"""Plain decoding against stock `generate`, interleaved: tokens/s by batch size, and time outside the model's forward.

python -m benchmarks.plain_loop --target smollm2 --dtype bfloat16 --batches 1,8,32 --json results/plain-bfloat16.json
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import GenerationConfig

from benchmarks.pages import run_alone
from benchmarks.steps import meta
from ctc_drafter.decode.generate import plain_generate
from ctc_drafter.evaluate.bench import parse_sizes
from ctc_drafter.evaluate.hf_generate import generated
from ctc_drafter.files import check_place, markdown_table, write_json
from ctc_drafter.load import chosen_device, load_target
from ctc_drafter.steps import Steps
from ctc_drafter.target.features import HOOKS
from ctc_drafter.target.model import Target

# Goals: tokens/s at least 0.97 of stock `generate`'s; at most 3% of the time outside the model's own forward.
#
# Prompts are random tokens, of lengths that differ as users' do: what is written does not matter to the time. Wall time
# needs a quiet machine; with --cpu-time the process's own CPU time is measured, for a machine that is shared.

SHORTEST, LONGEST = 20, 120  # tokens of a prompt


@dataclass(frozen=True)
class Side:
    """Ours or stock. seconds: of each round, all of it. share: of them outside the model's forward, in the median."""

    name: str
    rows: int
    seconds: tuple[float, ...]
    share: float

    def speed(self, tokens: int) -> float:
        """Tokens per second in the median, all rows together."""
        return self.rows * tokens / statistics.median(self.seconds)


def main(
    target: Annotated[str, typer.Option("--target", help="Target model: smollm2, tiny, a folder or a hub id.")],
    dtype: Annotated[str, typer.Option("--dtype", help="Floating-point type: float32 or bfloat16.")] = "bfloat16",
    batches: Annotated[str, typer.Option("--batches", help="Comma-separated batch sizes.")] = "1,8,32",
    tokens: Annotated[int, typer.Option("--max-new-tokens", min=2, help="New tokens of each row.")] = 64,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds; the two sides take turns.")] = 5,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Number of CPU threads.")] = None,
    device: Annotated[str, typer.Option("--device", help="Device: auto, cpu or cuda.")] = "auto",
    compiled: Annotated[bool, typer.Option("--compile", help="Compile our steps first.")] = False,
    cpu_time: Annotated[bool, typer.Option("--cpu-time", help="CPU time instead of wall time.")] = False,
    out: Annotated[Path | None, typer.Option("--json", help="JSON file for the results.")] = None,
) -> None:
    """Measures both sides at each batch size."""
    if out is not None:
        check_place(out)
    if threads:
        torch.set_num_threads(threads)
    place = chosen_device(device)
    found, _ = load_target(target, dtype, place)
    sizes = [size for size in parse_sizes(batches) if isinstance(size, int)]
    if compiled:
        found = Steps(compiled=True).of(found, [], 0, max(sizes))
    clock = time.process_time if cpu_time else time.perf_counter
    sides = [side for rows in sizes for side in measured(found, rows, tokens, rounds, clock)]
    if out is not None:
        about = {**meta("plain", place, compiled, rounds), "target": target, "dtype": dtype, "cpu_time": cpu_time}
        write_json(out, {"meta": about, "sides": [asdict(side) | {"speed": side.speed(tokens)} for side in sides]})
    print(markdown(sides, tokens))


def measured(
    target: Target, rows: int, tokens: int, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[Side]:
    """Ours and stock on the same prompts, in turns; one round of each goes before."""
    prompts, config = random_prompts(target, rows), GenerationConfig(max_new_tokens=tokens, do_sample=False)
    config.pad_token_id, config.eos_token_id = 0, None

    def ours() -> None:
        plain_generate(target, prompts, max_new_tokens=tokens, eos=())

    def stock() -> None:
        generated(target.model, prompts, config)

    taken: dict[str, list[tuple[float, float]]] = {"ours": [], "stock": []}
    for _ in range(rounds + 1):
        for name, work in (("ours", ours), ("stock", stock)):
            with model_time(target, clock) as inside:
                begin = clock()
                work()
                wait_for(target)
                taken[name].append((clock() - begin, sum(inside)))
    return [side(name, rows, found[1:]) for name, found in taken.items()]


def side(name: str, rows: int, taken: Sequence[tuple[float, float]]) -> Side:
    shares = [1 - inside / whole for whole, inside in taken]
    return Side(name, rows, tuple(whole for whole, _ in taken), statistics.median(shares))


def random_prompts(target: Target, rows: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(rows)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (rows,), generator=generator).tolist()
    return [torch.randint(target.vocab_size, (count,), generator=generator).tolist() for count in lengths]


@contextmanager
def model_time(target: Target, clock: Callable[[], float]) -> Iterator[list[float]]:
    """Collects the time of each forward of the model; of a compiled one, which calls no module, nothing."""
    begun, taken = [0.0], list[float]()

    def start(*_: Any) -> None:
        wait_for(target)
        begun[0] = clock()

    def stop(*_: Any) -> None:
        wait_for(target)
        taken.append(clock() - begun[0])

    with HOOKS:
        handles = [target.model.register_forward_pre_hook(start), target.model.register_forward_hook(stop)]
    try:
        yield taken
    finally:
        with HOOKS:
            for handle in handles:
                handle.remove()


def wait_for(target: Target) -> None:
    if target.device.type == "cuda":
        torch.cuda.synchronize(target.device)


def markdown(sides: Sequence[Side], tokens: int) -> str:
    """A line for each batch size: tokens/s, ours over stock in the median of the rounds' ratios, and both shares."""
    lines = []
    for ours, stock in zip(sides[::2], sides[1::2], strict=True):
        ratios = [theirs / mine for mine, theirs in zip(ours.seconds, stock.seconds, strict=True)]
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        speeds = [f"{each.speed(tokens):.1f}" for each in (ours, stock)]
        lines.append([str(ours.rows), *speeds, spread, f"{ours.share:.1%}", f"{stock.share:.1%}"])
    head = ["batch", "ours, tokens/s", "stock, tokens/s", "ours / stock", "ours, outside the model", "stock, outside"]
    return markdown_table(head, lines)


if __name__ == "__main__":
    run_alone(main)
