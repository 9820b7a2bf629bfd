"""`Speculator`: a model and a drafter as one object, with the `generate` of transformers."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from types import MethodType
from typing import Any, Unpack

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput

from ctc_drafter.decode.batch import DecodingConfig, DecodingOptions
from ctc_drafter.decode.generate_settings import SPECULATOR, Status
from ctc_drafter.decode.hf import Decoder
from ctc_drafter.decode.sequence import OnTokens
from ctc_drafter.decode.stats import Stats
from ctc_drafter.drafters.base import Drafter
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.drafters.warm_start import AutoDrafter
from ctc_drafter.target.checks import plain_model
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError


class Speculator:
    """A model that generates what it always did, in fewer steps.

        fast = Speculator(model, "owner/drafter")
        output = fast.generate(**inputs, max_new_tokens=256, streamer=TextStreamer(tokenizer))
        fast.stats.tokens_per_step

    model: of transformers, with LoRA adapters or without, or a `Target`. drafter: a loaded one, a folder or hub id, or
    None, which copies from the text (prompt lookup). config, or its fields by name, such as `nodes=32`: see
    `DecodingConfig`; the sampler is `generate`'s. A drafter on another device or in another dtype than the model is
    copied there, and stays as it is. Whatever else is asked of a Speculator is the model's, so it goes where a model
    goes that generates, such as into `transformers.pipeline`. Calls from several threads do not see each other.

    Raises `UserError` for what is no model or no drafter, and for a drafter of another model.
    """

    model: PreTrainedModel
    drafter: Drafter

    def __init__(
        self,
        model: PreTrainedModel | Target,
        drafter: Drafter | str | Path | None = None,
        config: DecodingConfig | None = None,
        **options: Unpack[DecodingOptions],
    ):
        found = plain_model(model.model if isinstance(model, Target) else model)
        if drafter is None:
            drafter = PromptLookup()
        elif isinstance(drafter, str | Path):
            drafter = AutoDrafter.from_pretrained(drafter, found)
        decoder = Decoder(drafter, DecodingConfig.of(config, options), model if isinstance(model, Target) else None)
        decoder.check(found)
        vars(self).update(model=found, drafter=drafter, _decoder=decoder, _newest=Newest())

    @property
    def stats(self) -> Stats:
        """Counters of the last call that ended well: this thread's, or anybody's where this thread made none.

        `tokens_per_step`, `tokens`, `steps`, `seconds` and more; all zeros before the first call.
        """
        return self._newest.get()

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: Sequence[StoppingCriteria] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
        synced_gpus: bool | None = None,
        assistant_model: Any = None,
        streamer: BaseStreamer | None = None,
        negative_prompt_ids: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        custom_generate: Any = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        assistant_tokenizer: Any = None,
        on_tokens: OnTokens | None = None,
        **options: Any,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """The model's `generate`: same arguments, and same output, or with sampling the same distribution.

        Beside those, `seeds=[...]` with `do_sample=True`, one integer for each sequence to return, and
        `on_tokens(row, tokens)`, which is told what each step emits. Raises `UserError` for what cannot be honoured;
        docs/generate.md has every argument.
        """
        configs = [generation_config, self.model.generation_config]
        given = {
            "synced_gpus": synced_gpus,
            "assistant_model": assistant_model,
            "assistant_tokenizer": assistant_tokenizer,
            "custom_generate": custom_generate,
            "token_healing": asked("token_healing", options, configs),
            "cache_implementation": options.get("cache_implementation") == "paged",
        }
        for setting in SPECULATOR:
            if setting.status is Status.REFUSED and given[setting.name] not in setting.neutral:
                raise UserError(setting.note)
        strings = asked("stop_strings", options, configs)
        if strings is not None:
            stopping_criteria = with_strings(stopping_criteria or (), strings, tokenizer)
            generation_config = without_strings(generation_config, options, self.model.generation_config)
        found: torch.Tensor | GenerateDecoderOnlyOutput = self.model.generate(
            inputs,
            generation_config,
            logits_processor,
            None if stopping_criteria is None else StoppingCriteriaList(stopping_criteria),
            prefix_allowed_tokens_fn,
            negative_prompt_ids=negative_prompt_ids,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            custom_generate=self._decoder.call(on_tokens, streamer, self._newest.put),
            **options,
        )
        return found

    def __call__(self, *args: Any, **options: Any) -> Any:
        """The model's forward pass."""
        return self.model(*args, **options)

    def __getattr__(self, name: str) -> Any:
        if name in ("model", "drafter", "_decoder", "_newest"):  # not there yet, as in a copy that is being made
            raise AttributeError(name)
        found = getattr(self.model, name)
        return found if not isinstance(found, MethodType) else self._method(found)

    def _method(self, method: MethodType) -> Callable[..., Any]:
        """A method of the model, which returns the Speculator where it would return the model: `to`, `eval`, ..."""

        @wraps(method)
        def call(*args: Any, **options: Any) -> Any:
            found = method(*args, **options)
            return self if found is self.model else found

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        raise UserError(f"a Speculator keeps nothing; set {name} on its model: .model.{name} = ...")

    def __repr__(self) -> str:
        return f"Speculator({type(self.model).__name__}, {type(self.drafter).__name__})"

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # pipelines ask for the name of the class, and complain of others than models'
        return type(self.model)


class Newest:
    """The newest stats: of each thread, and of all of them."""

    def __init__(self) -> None:
        self.own, self.of_all = threading.local(), Stats()

    def put(self, stats: Stats) -> None:
        self.own.stats = self.of_all = stats

    def get(self) -> Stats:
        found: Stats = getattr(self.own, "stats", self.of_all)
        return found


def asked(name: str, options: dict[str, Any], configs: Sequence[GenerationConfig | None]) -> Any:
    """A field of the generation config as `generate` finds it: by name, else in the first config that has it."""
    if name in options:
        return options[name]
    return next((value for each in configs if (value := getattr(each, name, None)) is not None), None)


def with_strings(
    criteria: Sequence[StoppingCriteria], strings: str | list[str], tokenizer: PreTrainedTokenizerBase | None
) -> list[StoppingCriteria]:
    """The criteria, and the one that `generate` makes of `stop_strings`.

    Raises `UserError` where the tokenizer is missing, or such a criterion is there, which `generate` would prefer.
    """
    if tokenizer is None:
        raise UserError("stop_strings needs the model's tokenizer; call generate with tokenizer=tokenizer, too")
    if any(type(each) is StopStringCriteria for each in criteria):
        raise UserError("stop_strings and a StopStringCriteria both say where to stop; put all strings into one")
    return [*criteria, StopStringCriteria(tokenizer, strings)]


def without_strings(
    config: GenerationConfig | None, options: dict[str, Any], saved: GenerationConfig
) -> GenerationConfig | None:
    """The config without stop strings, which `generate` would refuse; in `options`, where another place has them."""
    if config is None or "stop_strings" in options or saved.stop_strings is not None:
        options["stop_strings"] = None
        return config
    config = copy.deepcopy(config)
    config.stop_strings = None
    return config
