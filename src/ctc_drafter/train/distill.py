"""The target answers the prompts: the only text that a drafter should learn from."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ctc_drafter.chat import eos_ids
from ctc_drafter.decode.generate import plain_generate
from ctc_drafter.decode.sampling import ARGMAX, Chooser, Sampled, row_seeds, warpers
from ctc_drafter.provenance import digest, weights_hash
from ctc_drafter.target.model import Target
from ctc_drafter.train.prompts import Prompt
from ctc_drafter.train.shards import Distilled, Shards, fitting, origin
from ctc_drafter.types import UserError, lacks_memory


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: greedily at temperature 0, else by a seed of each prompt's own."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.top_p < 1 and not self.temperature:
            raise UserError("top_p says nothing about greedy answers; give --temperature as well")

    def seed_of(self, prompt: Prompt) -> int:
        """31 bits that depend on seed and prompt alone."""
        return int(digest(f"{self.seed}:{prompt.id}"), 16) & 0x7FFFFFFF


GREEDY = Sampling()


def distill(
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    out: Path,
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    shard_size: int = 256,
    eos: Collection[int] | None = None,
    name: str = "",
    sampling: Sampling = GREEDY,
    source: dict[str, str] | None = None,
    progress: bool = True,
) -> Distilled:
    """Writes the target's answers to `out/shard-00000.jsonl` and on, `shard_size` prompts each; see `Shards`.

    The same call may be killed and repeated at any time: it goes on after the last finished shard. `name`, and `source`
    of the prompts, are kept in the manifest; prompts that leave no room for `max_new_tokens` are left out. Raises
    `UserError` for a folder of another run, for a full disk and for too little memory: a smaller `batch_size` goes on.
    """
    chosen = fitting(prompts, max_new_tokens, target.context)
    eos = eos_ids(target.model, tokenizer) if eos is None else tuple(sorted(eos))
    settings = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "shard_size": shard_size, "eos": eos}
    settings["sampling"] = asdict(sampling)
    about = {"target": name or target.model.config.name_or_path or type(target.model).__name__}
    about |= {
        "weights": weights_hash(target.model),
        "dtype": str(target.dtype).removeprefix("torch."),
        "ids": "written",
    }
    manifest = about | origin(target.model.config, tokenizer, chosen) | {"settings": settings, "source": source or {}}
    with batch_errors(batch_size), Shards(out, chosen, shard_size, manifest, progress) as shards:
        for index in shards.missing:
            shard = shards.of(index)
            answers: list[list[int]] = [[]] * len(shard)
            for batch in _batches(shard, batch_size):
                generation = plain_generate(
                    target,
                    [shard[i].ids for i in batch],
                    max_new_tokens=max_new_tokens,
                    eos=eos,
                    chooser=chooser([shard[i] for i in batch], sampling),
                )
                for i, answer in zip(batch, generation.tokens, strict=True):
                    answers[i] = answer
                    shards.count(answer, cut=len(answer) == max_new_tokens and answer[-1] not in eos)
            shards.write(index, answers)
        return shards.summary(too_long=len(prompts) - len(chosen))


@contextmanager
def batch_errors(batch_size: int) -> Iterator[None]:
    """Turns a lack of memory into one line that says what lowers it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        advice = f"--batch-size {batch_size // 2}" if batch_size > 1 else "a smaller --dtype, or a --server"
        raise UserError(
            f"too little memory for {batch_size} answers at a time; give {advice}: finished shards are kept, and the "
            "same command goes on"
        ) from error


def chooser(prompts: Sequence[Prompt], sampling: Sampling) -> Chooser:
    if not sampling.temperature:
        return ARGMAX
    # Each is the first choice of a request of its own, as a server has it.
    seeds = [row_seeds(sampling.seed_of(prompt), [0])[0] for prompt in prompts]
    return Sampled(seeds, warpers(temperature=sampling.temperature, top_p=sampling.top_p))


def _batches(shard: Sequence[Prompt], size: int) -> Iterator[list[int]]:
    """Indices of prompts of like length, so that little of a batch is padding."""
    order = sorted(range(len(shard)), key=lambda i: len(shard[i].ids))
    return (order[at : at + size] for at in range(0, len(order), size))
