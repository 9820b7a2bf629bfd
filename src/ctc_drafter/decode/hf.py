"""`model.generate(..., custom_generate=speculate(drafter))`: the same call, the same answer, sooner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput, GenerationMode

from ctc_drafter.decode.batch import Method
from ctc_drafter.decode.choose import ARGMAX, Chooser, Greedy, Sampled
from ctc_drafter.decode.generate import DEFAULT_FLOOR, DEFAULT_NODES, check_room, run
from ctc_drafter.decode.rows import Row
from ctc_drafter.decode.writer import OnTokens
from ctc_drafter.drafters.base import Drafter
from ctc_drafter.target import UNLIMITED_CONTEXT, Target
from ctc_drafter.types import UserError

# What `generate` prepares for every callable, and we make ourselves.
PREPARED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}
LARGEST_SEED = (1 << 63) - 1


def speculate(
    drafter: Drafter,
    nodes: int = DEFAULT_NODES,
    floor: float = DEFAULT_FLOOR,
    on_tokens: OnTokens | None = None,
    streamer: BaseStreamer | None = None,
) -> Callable[..., torch.Tensor | GenerateDecoderOnlyOutput]:
    """A callable for `custom_generate`: greedy or sampled, any logits processors and stopping criteria.

    Rows may be padded on the left, as `generate` expects them. With `do_sample=True` each row, returned sequences
    counted, has a seed of its own: from `generate(..., seeds=[...])`, else drawn from PyTorch's generator, so that
    `torch.manual_seed` repeats a run. Rows that stop early are filled up with the pad token.

    `on_tokens(row, tokens)` streams; so does a streamer of transformers, which is given here, since `generate` does
    not hand its own to callables. What cannot be honoured, and a drafter of another target, raises `UserError`.
    """

    wrap = lru_cache(maxsize=1)(Target.wrap)  # tries a model once, not in every call

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
        refuse_settings(generation_config)
        refuse_inputs(input_ids, prepared)
        check = getattr(drafter, "check_target", None)
        if check is not None:
            check(model.config)
        target = wrap(model)
        chooser = chooser_of(generation_config, logits_processor, seeds, len(input_ids))
        rows = rows_of(input_ids, prepared.get("attention_mask"), stopping_criteria, target)
        told = on_tokens if streamer is None else streaming(streamer, input_ids, on_tokens)
        generation = run(Method(target, drafter, nodes, floor, chooser), rows, remaining(stopping_criteria), told)
        if streamer is not None:
            streamer.end()
        filler = filler_of(generation_config.pad_token_id, stopping_criteria)
        width = max(map(len, generation.tokens))
        new = [row + [filler] * (width - len(row)) for row in generation.tokens]
        sequences = torch.cat([input_ids, torch.tensor(new, device=input_ids.device)], 1)
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)
        return sequences

    return decode


def filler_of(pad: int | None, criteria: StoppingCriteriaList) -> int:
    """What rows that ended are filled up with: as in `generate`, the first of several end tokens if there is no pad."""
    return pad if pad is not None else next(iter(end_tokens(criteria)), 0)


def end_tokens(criteria: StoppingCriteriaList) -> list[int]:
    """In the order in which they were given."""
    found = (each.eos_token_id.flatten().tolist() for each in criteria if type(each) is EosTokenCriteria)
    return [token for tokens in found for token in tokens]


def chooser_of(
    config: GenerationConfig, processors: LogitsProcessorList, seeds: Sequence[int] | None, rows: int
) -> Chooser:
    """The choice that this configuration asks for; `rows` is how many there are."""
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
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, criteria: StoppingCriteriaList, target: Target
) -> list[Row]:
    """Rows of `int64 [B, T]`, read without the padding that a 2-D mask marks, with their ends.

    Raises `UserError` where the target has no positions for all that may be written, and for rows of different lengths
    that may come where a longrope target changes its factors: stock `generate` then looks at the padded length.
    """
    lengths = [each.max_length for each in criteria if type(each) is MaxLengthCriteria]
    room = min(lengths, default=UNLIMITED_CONTEXT) - input_ids.shape[1]
    eos = frozenset(end_tokens(criteria))
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rows = []
    for index, (given, keep) in enumerate(zip(input_ids, mask, strict=True)):
        prompt = given[keep.bool()].tolist()
        rows.append(Row(index, prompt, room, eos, given.tolist()))
    if lengths:
        check_room(rows, target.limit)
    padded = any(len(row.prompt) < input_ids.shape[1] for row in rows)
    if padded and target.switch is not None and input_ids.shape[1] + room > target.switch:
        raise UserError(
            f"rows of different lengths may come to {target.switch} tokens, where this target changes its rotary "
            "factors for the padded length; generate them one at a time"
        )
    return rows


def remaining(criteria: StoppingCriteriaList) -> StoppingCriteriaList:
    """Without those that rows know themselves."""
    return StoppingCriteriaList(each for each in criteria if type(each) not in (MaxLengthCriteria, EosTokenCriteria))


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


def refuse_settings(config: GenerationConfig) -> None:
    """Raises `UserError` for decoding modes other than greedy and sampling, and for outputs that are not kept."""
    if config.num_beams and config.num_beams > 1:
        raise UserError("speculate has no beams; call generate with num_beams=1")
    if config.use_cache is False:
        raise UserError("speculate needs the cache; call generate without use_cache=False")
    drafts = [
        name for name in ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp") if getattr(config, name, None)
    ]
    if drafts:
        raise UserError(f"{drafts[0]} and custom_generate both ask for drafts; leave out {drafts[0]}")
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UserError(f"speculate cannot do {mode.value}; leave out the settings that ask for it")
    kept = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    asked = [name for name in kept if getattr(config, name, False)]
    if asked:
        raise UserError(f"speculate does not keep what {asked[0]} asks for; leave it out")


def refuse_inputs(input_ids: torch.Tensor, prepared: dict[str, Any]) -> None:
    """Raises `UserError` for inputs other than ids from position 0 on."""
    if not input_ids.numel():
        raise UserError("speculate reads token ids; call generate with input_ids")
    unknown = sorted(name for name, value in prepared.items() if name not in PREPARED and value is not None)
    if unknown:
        raise UserError(f"speculate cannot hand {unknown[0]} to the model; leave it out")
    cache = prepared.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise UserError("speculate reads the whole prompt itself; leave out past_key_values")
    positions, mask = prepared.get("position_ids"), prepared.get("attention_mask")
    if positions is not None:
        mask = torch.ones_like(input_ids) if mask is None else mask
        usual = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
        if not torch.equal(positions.masked_fill(mask == 0, 0).to(usual), usual):
            raise UserError("speculate counts positions from 0; leave out position_ids")
