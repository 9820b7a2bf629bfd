"""`model.generate(..., custom_generate=speculate(drafter))`: the same call, the same answer, sooner."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

from ctc_drafter.decode.generate import DEFAULT_NODES, generate
from ctc_drafter.decode.writer import OnTokens
from ctc_drafter.drafters.base import Drafter
from ctc_drafter.target import Target
from ctc_drafter.types import UserError

# What our own loop does by itself: length and end tokens.
HANDLED = {"MaxLengthCriteria", "EosTokenCriteria"}


def speculate(
    drafter: Drafter, nodes: int = DEFAULT_NODES, on_tokens: OnTokens | None = None
) -> Callable[..., torch.Tensor | GenerateDecoderOnlyOutput]:
    """A callable for `custom_generate`. Greedy; rows may be padded on the left, as `generate` expects them.

    `on_tokens(row, tokens)` streams: `generate` does not hand its own `streamer` to callables. Settings that
    would change the output otherwise than by the argmax, and a drafter of another target, raise `UserError`.
    """

    wrap = lru_cache(maxsize=1)(Target.wrap)  # tries a model once, not in every call

    def decode(
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **prepared: Any,  # naming attention_mask here would make `generate` pass it twice
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """Returns what `generate` returns: ids `[B, T + new]`, or a `GenerateDecoderOnlyOutput` around them."""
        refuse_settings(generation_config, logits_processor, stopping_criteria)
        check = getattr(drafter, "check_target", None)
        if check is not None:
            check(model.config)
        eos = generation_config.eos_token_id
        ends = [eos] if isinstance(eos, int) else list(eos or [])
        result = generate(
            wrap(model),
            drafter,
            unpadded(input_ids, prepared.get("attention_mask")),
            max_new_tokens=generation_config.max_length - input_ids.shape[1],
            nodes=nodes,
            eos=ends,
            on_tokens=on_tokens,
        )
        pad = generation_config.pad_token_id
        filler = pad if pad is not None else (ends or [0])[0]
        width = max(map(len, result.tokens))
        new = [row + [filler] * (width - len(row)) for row in result.tokens]
        sequences = torch.cat([input_ids, torch.tensor(new, device=input_ids.device)], 1)
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)
        return sequences

    return decode


def unpadded(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
    """Rows of `int64 [B, T]` without the padding that a 2-D mask marks."""
    if attention_mask is None:
        return input_ids.tolist()
    return [row[keep.bool()].tolist() for row, keep in zip(input_ids, attention_mask, strict=True)]


def refuse_settings(config: GenerationConfig, processors: LogitsProcessorList, criteria: StoppingCriteriaList) -> None:
    """Raises `UserError` for what greedy decoding of token ids cannot honour."""
    if config.do_sample:
        raise UserError("speculate decodes greedily; call generate with do_sample=False")
    if config.num_beams and config.num_beams > 1:
        raise UserError("speculate has no beams; call generate with num_beams=1")
    if config.use_cache is False:
        raise UserError("speculate needs the cache; call generate without use_cache=False")
    if processors:
        raise UserError(f"speculate cannot apply {type(processors[0]).__name__} yet; leave out its setting")
    other = [type(c).__name__ for c in criteria if type(c).__name__ not in HANDLED]
    if other:
        raise UserError(f"speculate cannot apply {other[0]} yet; leave out its setting")
    kept = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    asked = [name for name in kept if getattr(config, name, False)]
    if asked:
        raise UserError(f"speculate does not keep what {asked[0]} asks for; leave it out")
