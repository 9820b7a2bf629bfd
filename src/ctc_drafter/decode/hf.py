"""`speculate`: `custom_generate` adapter for transformers, with scores and logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Unpack

import torch
from transformers import GenerationConfig, LogitsProcessorList, MaxLengthCriteria, PreTrainedModel, StoppingCriteriaList
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput

from ctc_drafter.decode.batch import DecodingConfig, DecodingOptions, Method
from ctc_drafter.decode.generate import check_room, run
from ctc_drafter.decode.generate_inputs import has_pictures, passed_name, refuse_encoder, refuse_inputs
from ctc_drafter.decode.generate_settings import refuse_settings
from ctc_drafter.decode.pictures import Pictures
from ctc_drafter.decode.processors import end_tokens, fills_up, process, refuse_criteria, remaining
from ctc_drafter.decode.profile import settled
from ctc_drafter.decode.sampling import ARGMAX, Greedy, Sampled, Sampler, walk
from ctc_drafter.decode.sequence import OnTokens, SequenceState
from ctc_drafter.decode.stats import Stats
from ctc_drafter.drafters.base import Drafter, placed, state_of
from ctc_drafter.target.checks import refuse_unloaded
from ctc_drafter.target.model import UNLIMITED_CONTEXT, Target
from ctc_drafter.types import TokenTree, UserError

# `model.generate(..., custom_generate=speculate(drafter))`: same call, same output.

LARGEST_SEED = (1 << 63) - 1


Decode = Callable[..., "torch.Tensor | GenerateDecoderOnlyOutput"]
OnStats = Callable[[Stats], None]


def speculate(
    drafter: Drafter,
    config: DecodingConfig | None = None,
    on_tokens: OnTokens | None = None,
    streamer: BaseStreamer | None = None,
    **options: Unpack[DecodingOptions],
) -> Decode:
    """A callable for `custom_generate`: greedy or sampled, any logits processors and stopping criteria.

    Rows may be padded on the left, as `generate` expects them. With `do_sample=True` each row, returned sequences
    counted, has a seed of its own: from `generate(..., seeds=[...])`, else drawn from PyTorch's generator, so that
    `torch.manual_seed` repeats a run. Rows that stop early are filled up with the pad token.

    Trees are as `config` says, as large as pays without one; its fields may be given by name instead, such as
    `nodes=32` or `budget=...`, but for the sampler, which is `generate`'s. A drafter on another device or in another
    dtype than the model is copied there.

    `on_tokens(row, tokens)` streams; so does a streamer of transformers, which is given here: `generate` keeps its own
    `streamer`, `assistant_model`, `tokenizer` and `synced_gpus` from callables, and nothing here can notice them; a
    `Speculator` takes them. What cannot be honoured, and a drafter of another target, raises `UserError`;
    docs/generate.md has every parameter.
    """
    return Decoder(drafter, DecodingConfig.of(config, options)).call(on_tokens, streamer)


class Decoder:
    """A drafter and the settings of its trees, made ready for a model once and not in every call.

    target: the model, where it has been tried, and compiled perhaps.
    """

    def __init__(self, drafter: Drafter, config: DecodingConfig, target: Target | None = None):
        refuse_drafter(drafter)
        self.drafter = drafter
        self.trees = config.without_sampler("call generate with do_sample=True and its settings, and seeds=[...]")
        self.wrap = lru_cache(maxsize=1)(Target.wrap if target is None else lambda _model: target)
        self.tried: Target | None = None  # with pictures
        self.place = lru_cache(maxsize=1)(lambda device, dtype, _state: placed(drafter, device, dtype))

    def check(self, model: PreTrainedModel) -> None:
        """Raises `UserError` for a model that the drafter was not made for."""
        check = getattr(self.drafter, "check_target", None)
        if check is not None:
            check(model.config)

    def method(self, model: PreTrainedModel, sampler: Sampler) -> Method:
        """What rows are decoded by. Raises `UserError` for a model that cannot be a target."""
        target = self.wrap(model)
        drafter = self.place(target.device, target.dtype, state_of(self.drafter))
        return Method(target, drafter, replace(self.trees, sampler=sampler))

    def shown(self, method: Method, pictures: Pictures) -> Method:
        """The method, for prompts with these pictures. A target is tried with pictures at its first ones."""
        pictures.check(method.target)
        pictures = replace(pictures, tried=method.target is self.tried)
        return replace(method, pictures=pictures)

    def call(
        self,
        on_tokens: OnTokens | None = None,
        streamer: BaseStreamer | None = None,
        on_stats: OnStats | None = None,
    ) -> Decode:
        """The callable; `on_stats` is told of each call that ends well. See `speculate`."""

        def decode(
            model: PreTrainedModel,
            input_ids: torch.Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: StoppingCriteriaList,
            generation_config: GenerationConfig,
            seeds: Sequence[int] | None = None,
            **prepared: Any,  # naming attention_mask here would make `generate` pass it twice
        ) -> torch.Tensor | GenerateDecoderOnlyOutput:
            """Returns what `generate` returns: ids `[B, T + new]`, or a `GenerateDecoderOnlyOutput` around them."""
            config = generation_config
            refuse_encoder(model)
            refuse_settings(config, model.generation_config)
            mask = refuse_inputs(model, input_ids, prepared)
            self.check(model)
            sampler = sampler_of(config, logits_processor, seeds, len(input_ids))
            scored = bool(config.return_dict_in_generate and config.output_scores)
            record = Record() if config.return_dict_in_generate and (scored or config.output_logits) else None
            refuse_criteria(remaining(stopping_criteria, scored=False), input_ids)
            criteria = remaining(stopping_criteria, scored)
            method = self.method(model, sampler)
            if has_pictures(prepared):
                method = self.shown(method, Pictures(input_ids, mask, prepared, passed_name(model, prepared)))
            rows = rows_of(input_ids, mask, stopping_criteria, method.target)
            method = settled(method, len(rows))
            told = on_tokens if streamer is None else streaming(streamer, input_ids, on_tokens)
            rows, stats = decode_rows(method, rows, criteria, told, record, fills_up(stopping_criteria))
            self.tried = method.target if method.pictures else self.tried
            if streamer is not None:
                streamer.end()
            if on_stats is not None:
                on_stats(stats)
            filler = filler_of(config.pad_token_id, stopping_criteria)
            width = max(len(row.tokens) for row in rows)
            new = [row.tokens + [filler] * (width - len(row.tokens)) for row in rows]
            sequences = torch.cat([input_ids, torch.tensor(new, device=input_ids.device)], 1)
            if not config.return_dict_in_generate:
                return sequences
            logits = None if record is None else emitted_logits(method, record, rows, filler)
            scores = scores_of(logits_processor, logits, rows, filler) if scored and logits else None
            return GenerateDecoderOnlyOutput(
                sequences=sequences, scores=scores, logits=logits if config.output_logits else None
            )

        return decode


def refuse_drafter(drafter: Any) -> None:
    """Raises `UserError` for anything but a loaded drafter."""
    if isinstance(drafter, str | Path):
        raise UserError(f"{drafter} is a name; load the drafter first: AutoDrafter.from_pretrained({str(drafter)!r})")
    if isinstance(drafter, type) or not callable(getattr(drafter, "begin", None)):
        name = drafter.__name__ if isinstance(drafter, type) else type(drafter).__name__
        raise UserError(f"{name} is no drafter; give one that is loaded, such as AutoDrafter.from_pretrained(folder)")
    refuse_unloaded(drafter)


def filler_of(pad: int | None, criteria: StoppingCriteriaList) -> int:
    """Fill token of rows that ended: as in `generate`, the pad token, else the first end token."""
    return pad if pad is not None else next(iter(end_tokens(criteria)), 0)


def sampler_of(
    config: GenerationConfig, processors: LogitsProcessorList, seeds: Sequence[int] | None, rows: int
) -> Sampler:
    """The sampler of a generation config, for a batch of `rows` rows."""
    if not config.do_sample:
        if seeds is not None:
            raise UserError("seeds are for sampling; call generate with do_sample=True, or leave them out")
        return Greedy(processors) if processors else ARGMAX
    if seeds is None:
        seeds = torch.randint(LARGEST_SEED, (rows,)).tolist()
    if len(seeds) != rows:
        raise UserError(f"there are {len(seeds)} seeds for {rows} rows; give one for each sequence to return")
    return Sampled(seeds, processors)


def rows_of(
    input_ids: torch.Tensor, mask: torch.Tensor, criteria: StoppingCriteriaList, target: Target
) -> list[SequenceState]:
    """Rows of `int64 [B, T]`, read without the padding that a 2-D mask marks, with their ends.

    Raises `UserError` where the target has no positions for all that may be written, and for rows of different lengths
    that may come where a longrope target changes its factors: stock `generate` then looks at the padded length.
    """
    lengths = [each.max_length for each in criteria if type(each) is MaxLengthCriteria]
    room = min(lengths, default=UNLIMITED_CONTEXT) - input_ids.shape[1]
    eos = frozenset(end_tokens(criteria))
    rows = []
    for index, (given, keep) in enumerate(zip(input_ids, mask, strict=True)):
        prompt = given[keep.bool()].tolist()
        rows.append(SequenceState(index, prompt, room, eos, given.tolist()))
    if lengths:
        check_room(rows, target.limit)
    padded = any(len(row.prompt) < input_ids.shape[1] for row in rows)
    if padded and target.switch is not None and input_ids.shape[1] + room > target.switch:
        raise UserError(
            f"rows of different lengths may come to {target.switch} tokens, where this target changes its rotary "
            "factors for the padded length; generate them one at a time"
        )
    return rows


def decode_rows(
    method: Method,
    rows: Sequence[SequenceState],
    criteria: StoppingCriteriaList,
    on_tokens: OnTokens | None,
    record: Record | None,
    filled: bool,
) -> tuple[list[SequenceState], Stats]:
    """Decodes the rows until each has ended, or, unless those that have are `filled` up, until all of them have.

    What is decoded twice for that counts twice in the steps and their tokens, and once among the tokens.
    """
    stats = run(method, rows, criteria, on_tokens, on_logits=record).stats
    width = max(len(row.tokens) for row in rows)
    short = [row for row in rows if len(row.tokens) < width and not row.ended]
    if filled or not short:
        return list(rows), stats
    longer = [replace(row, limit=width, tokens=[], accepted=[]) for row in short]
    shown = {row.index: len(row.tokens) for row in short}

    def tell(index: int, tokens: list[int]) -> None:
        new = tokens[max(0, shown[index]) :]
        shown[index] -= len(tokens)
        if on_tokens is not None and new:
            on_tokens(index, new)

    again = None if record is None else Record()
    more = run(method, longer, on_tokens=tell, on_logits=again).stats  # the same tokens, and those that follow
    if record is not None and again is not None:
        record.parts.update(again.parts)
    replaced = {row.index: row for row in longer}
    found = [replaced.get(row.index, row) for row in rows]
    return found, replace(stats + more, tokens=sum(len(row.tokens) for row in found))


def streaming(streamer: BaseStreamer, input_ids: torch.Tensor, on_tokens: OnTokens | None) -> OnTokens:
    """Feeds the streamer as `generate` does: the prompt, then token by token."""
    if len(input_ids) > 1:
        raise UserError(f"a streamer shows one row, not {len(input_ids)}; use on_tokens")
    streamer.put(input_ids.cpu())

    def tell(row: int, tokens: list[int]) -> None:
        for token in tokens:
            streamer.put(torch.tensor([token]))
        if on_tokens is not None:
            on_tokens(row, tokens)

    return tell


# `generate(..., output_scores=True, output_logits=True)`: logits and processed scores of each emitted token.


@dataclass
class Chosen:
    """The logits `[n, V]` that tokens from the index `first` on were chosen from; more than were emitted, at first."""

    first: int
    logits: torch.Tensor


@dataclass(frozen=True)
class Record:
    """Keeps the logits of every emitted token of every row, by the rows' index. See `OnLogits`."""

    parts: dict[int, list[Chosen]] = field(default_factory=dict)

    def __call__(self, rows: Sequence[SequenceState], logits: torch.Tensor) -> None:
        for row, own in zip(rows, logits, strict=True):
            parts = self.parts.setdefault(row.index, [])
            if parts:  # now it is known how many of them were emitted; a clone lets go of the rest
                parts[-1].logits = parts[-1].logits[: len(row.tokens) - parts[-1].first].clone()
            parts.append(Chosen(len(row.tokens), own))

    def of(self, row: SequenceState) -> torch.Tensor:
        """`float32 [T, V]` of the row's T tokens."""
        return torch.cat([part.logits for part in self.parts[row.index]])[: len(row.tokens)].float()


@dataclass(frozen=True)
class Dictated:
    """A `Sampler` that writes these texts, by the rows' index, whatever the target says."""

    texts: dict[int, list[int]]

    def validate(self, row: SequenceState, logits: torch.Tensor) -> None:
        return

    def sample(self, logits: torch.Tensor, rows: Sequence[SequenceState]) -> torch.Tensor:
        return torch.tensor([self.texts[row.index][len(row.tokens)] for row in rows], device=logits.device)

    def sample_tree(self, tree: TokenTree, logits: torch.Tensor, rows: Sequence[SequenceState]) -> torch.Tensor:
        return walk(tree, logits, rows, self.sample)


def emitted_logits(
    method: Method, record: Record, rows: Sequence[SequenceState], filler: int
) -> tuple[torch.Tensor, ...]:
    """Logits `float32 [B, V]` of each step up to the longest row's last.

    Stock `generate` goes on with rows that have ended, as if pad tokens were text. So such rows are decoded anew, with
    their own tokens and then pad tokens dictated.
    """
    width = max(len(row.tokens) for row in rows)
    again = [
        replace(row, limit=width, eos=frozenset(), tokens=[], accepted=[]) for row in rows if len(row.tokens) < width
    ]
    anew, texts = Record(), padded(rows, filler, width)
    if again:
        run(replace(method, config=replace(method.config, sampler=Dictated(texts))), again, on_logits=anew)
    found = {row.index: record.of(row) for row in rows} | {row.index: anew.of(row) for row in again}
    return tuple(torch.stack([found[row.index] for row in rows]).unbind(1))


def padded(rows: Sequence[SequenceState], filler: int, width: int) -> dict[int, list[int]]:
    """Token ids as `generate` returns them, by row index."""
    return {row.index: row.tokens + [filler] * (width - len(row.tokens)) for row in rows}


def scores_of(
    processors: LogitsProcessorList, logits: Sequence[torch.Tensor], rows: Sequence[SequenceState], filler: int
) -> tuple[torch.Tensor, ...]:
    """Processed scores `float32 [B, V]` of each step, from its logits; rows that ended go on with pad tokens."""
    texts = padded(rows, filler, len(logits))
    return tuple(
        process(processors, each, [replace(row, tokens=texts[row.index][:step]) for row in rows])
        for step, each in enumerate(logits)
    )
