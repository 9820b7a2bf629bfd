"""Settings and inputs of transformers' `generate`: honoured, refused, or without effect."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sized
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode

from ctc_drafter.types import UserError

# Parameters of transformers' `generate` and fields of `GenerationConfig`: honoured, refused, or without effect.
#
# `speculate` refuses by these tables, `docs/generate.md` is made from them, and tests try each row against stock
# `generate`. A parameter that a later version of transformers adds fails a test until it has a row.

Asked = Callable[[GenerationConfig, GenerationConfig], bool]


class Status(Enum):
    """How a setting is handled."""

    HONOURED = "honoured"
    REFUSED = "refused"
    WITHOUT_EFFECT = "without effect"
    UNSEEN = "not handed over"  # transformers drops it before the callable is called

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Setting:
    """name; status; note: what it does here, or why it does nothing. Of a refused setting the note is the error.

    neutral: values that ask for nothing. asked: whether a configuration, beside the one saved with the model, asks for
    what is refused; None where the value alone says so. but: what is not refused of it. Where `by_transformers`, it is
    transformers that raises.
    """

    name: str
    status: Status
    note: str
    neutral: tuple[Any, ...] = (None, False)
    asked: Asked | None = None
    by_transformers: bool = False
    but: str = ""

    def refuses(self, config: GenerationConfig, saved: GenerationConfig) -> bool:
        """Whether this configuration asks for what is refused."""
        if self.status is not Status.REFUSED or self.by_transformers:
            return False
        if self.asked is not None:
            return self.asked(config, saved)
        return getattr(config, self.name, None) not in self.neutral


def honoured(name: str, note: str = "as in stock `generate`") -> Setting:
    return Setting(name, Status.HONOURED, note)


def refused(
    name: str, note: str, *neutral: Any, asked: Asked | None = None, by_transformers: bool = False, but: str = ""
) -> Setting:
    return Setting(name, Status.REFUSED, note, (None, False, *neutral), asked, by_transformers, but)


def idle(name: str, note: str) -> Setting:
    return Setting(name, Status.WITHOUT_EFFECT, note)


def unseen(name: str, note: str) -> Setting:
    return Setting(name, Status.UNSEEN, note)


def asks_no_cache(config: GenerationConfig, saved: GenerationConfig) -> bool:
    """Whether the call says so: many checkpoints of trained models have `use_cache: false` saved, and mean nothing."""
    return config.use_cache is False and saved.use_cache is not False


def asks_contrastive(config: GenerationConfig, _saved: GenerationConfig) -> bool:
    return config.get_generation_mode() == GenerationMode.CONTRASTIVE_SEARCH


def asks_other_cache(config: GenerationConfig, _saved: GenerationConfig) -> bool:
    return config.cache_implementation in OTHER_CACHES


OTHER_CACHES = ("quantized", "offloaded", "offloaded_static", "offloaded_hybrid", "offloaded_hybrid_chunked")
DRAFTS = "{0} and custom_generate both ask for drafts; leave out {0}"
KEPT = "speculate does not keep what {0} asks for; leave it out"
CONSTRAINED = "{0} asks for constrained beam search, which speculate cannot do; leave it out"
OF_BEAMS = "of beam search alone"
OF_ASSISTANTS = "of assisted generation alone"
OF_SAMPLING = "with `do_sample=True`, as in stock `generate`"

# What `generate` itself takes, its signature first, then what it takes out of its keyword arguments.
PARAMETERS = (
    honoured("inputs", "token ids `[B, T]`; padding on the left"),
    honoured("generation_config", "field by field, see below"),
    honoured("logits_processor", "functions of a row's text and scores; one that keeps a state is refused"),
    honoured(
        "stopping_criteria",
        "asked about each row after each token; in a batch, one that keeps a state or answers for all rows at once is "
        "refused",
    ),
    honoured("prefix_allowed_tokens_fn", "a function of row and text; one that keeps a state is refused"),
    unseen(
        "synced_gpus", "rows of one process never wait for another process; with FSDP or ZeRO-3 use stock `generate`"
    ),
    unseen("assistant_model", "not asked; the output is that of the model all the same"),
    unseen("streamer", "shows the prompt and nothing else; give it to `speculate(drafter, streamer=...)`"),
    idle("negative_prompt_ids", "of guidance_scale alone"),
    idle("negative_prompt_attention_mask", "of guidance_scale alone"),
    honoured("custom_generate", "`speculate(drafter)`; a drafter by itself is refused"),
    honoured("kwargs", "fields of `GenerationConfig` and inputs of the model, see below"),
    unseen("tokenizer", "needed by stop_strings and token_healing alone, which are refused"),
    unseen("assistant_tokenizer", OF_ASSISTANTS),
    idle("trust_remote_code", "of `custom_generate` as the name of a repository"),
    honoured("seeds", "`speculate`'s own: one integer for each returned sequence, with `do_sample=True`"),
)

# What a model may be given beside the settings. Anything else is refused by its name.
INPUTS = (
    honoured("input_ids", "token ids `[B, T]`; padding on the left"),
    honoured("attention_mask", "0 and 1, `[B, T]`; rows that end in 0 (padding on the right) are refused"),
    honoured("position_ids", "the usual ones, which `generate` makes; others are refused"),
    honoured("past_key_values", "an empty cache, which stays empty; one in use is refused"),
    refused("inputs_embeds", "speculate reads token ids, not embeddings; call generate with input_ids"),
    refused("pixel_values", "speculate reads text alone; leave out pixel_values"),
    refused("pixel_values_videos", "speculate reads text alone; leave out pixel_values_videos"),
    refused("input_features", "speculate reads text alone; leave out input_features"),
    honoured("token_type_ids", "zeros, which multimodal processors make for text; others are refused"),
    honoured("mm_token_type_ids", "zeros, which multimodal processors make for text; others are refused"),
)

FIELDS = (
    # Length
    honoured("max_length"),
    honoured("max_new_tokens"),
    honoured("min_length"),
    honoured("min_new_tokens"),
    idle("early_stopping", OF_BEAMS),
    honoured("max_time", "looked at after each token, of which a step may write several"),
    refused(
        "stop_strings",
        "transformers hands no tokenizer over and raises; give "
        "stopping_criteria=[StopStringCriteria(tokenizer, strings)]",
        by_transformers=True,
    ),
    # Strategy
    honoured("do_sample", "draws by seed, so other ones than stock's, from the same distribution"),
    refused("num_beams", "speculate has no beams; call generate with num_beams=1", 1),
    refused("use_mtp", DRAFTS.format("use_mtp")),
    # Cache
    refused(
        "use_cache",
        "speculate needs the cache; call generate without use_cache=False",
        asked=asks_no_cache,
        but="saved with a model, it is without effect",
    ),
    refused(
        "cache_implementation",
        f"speculate keeps a cache of its own; leave out cache_implementation ({', '.join(OTHER_CACHES[:3])})",
        asked=asks_other_cache,
        but="other values are without effect",
    ),
    idle("cache_config", "of quantized caches alone"),
    idle("max_cache_len", "speculate keeps a cache of its own, which grows"),
    # Scores
    honoured("temperature", OF_SAMPLING),
    honoured("top_k", OF_SAMPLING),
    honoured("top_p", OF_SAMPLING),
    honoured("min_p", OF_SAMPLING),
    honoured("top_h", OF_SAMPLING),
    honoured("typical_p", OF_SAMPLING),
    honoured("epsilon_cutoff", OF_SAMPLING),
    honoured("eta_cutoff", OF_SAMPLING),
    honoured("repetition_penalty"),
    refused(
        "encoder_repetition_penalty",
        "encoder_repetition_penalty looks at rows of the batch by their place; leave it out",
        1.0,
    ),
    idle("length_penalty", OF_BEAMS),
    honoured("no_repeat_ngram_size"),
    honoured("bad_words_ids"),
    honoured("renormalize_logits"),
    honoured("forced_bos_token_id"),
    honoured("forced_eos_token_id"),
    honoured("remove_invalid_values"),
    honoured("exponential_decay_length_penalty"),
    honoured("suppress_tokens"),
    honoured("begin_suppress_tokens"),
    honoured("sequence_bias"),
    refused(
        "token_healing",
        "transformers hands no tokenizer over and raises; leave out token_healing",
        by_transformers=True,
    ),
    refused("guidance_scale", "guidance_scale runs the model beside us; leave it out", 1),
    honoured(
        "watermarking_config", "`WatermarkingConfig`; `SynthIDTextWatermarkingConfig` keeps a state and is refused"
    ),
    # Outputs
    honoured("num_return_sequences"),
    refused("output_attentions", KEPT.format("output_attentions")),
    refused("output_hidden_states", KEPT.format("output_hidden_states")),
    honoured("output_scores", "with `return_dict_in_generate=True`; stopping criteria that read scores are refused"),
    honoured("output_logits", "with `return_dict_in_generate=True`"),
    honoured("return_dict_in_generate", "as in stock `generate`, but without `past_key_values`"),
    # Tokens
    honoured("pad_token_id"),
    honoured("bos_token_id", "begins the text where no input_ids are given"),
    honoured("eos_token_id"),
    # Encoders
    refused(
        "encoder_no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size looks at rows of the batch by their place; leave it out",
        0,
    ),
    idle("decoder_start_token_id", "of encoder-decoder models alone, which are refused"),
    # Assistants
    refused("is_assistant", "is_assistant is for models that draft for another; leave it out"),
    idle("num_assistant_tokens", OF_ASSISTANTS),
    idle("num_assistant_tokens_schedule", OF_ASSISTANTS),
    idle("assistant_confidence_threshold", OF_ASSISTANTS),
    refused("prompt_lookup_num_tokens", DRAFTS.format("prompt_lookup_num_tokens")),
    idle("max_matching_ngram_size", OF_ASSISTANTS),
    refused("assistant_early_exit", DRAFTS.format("assistant_early_exit")),
    idle("assistant_lookbehind", OF_ASSISTANTS),
    idle("target_lookbehind", OF_ASSISTANTS),
    idle("assistant_ensemble_weight", OF_ASSISTANTS),
    idle("speculation_type", OF_ASSISTANTS),
    # Speed
    idle("compile_config", "changes no output; speculate compiles nothing here"),
    idle("disable_compile", "changes no output; speculate compiles nothing here"),
    idle("continuous_batching_config", "of `generate_batch` alone"),
    idle("low_memory", "of contrastive search alone, which is refused"),
    idle("prefill_chunk_size", "changes no output; prompts are read in chunks anyhow"),
    # Moved to the hub
    refused(
        "penalty_alpha",
        "penalty_alpha asks for contrastive_search, which speculate cannot do; leave it out",
        asked=asks_contrastive,
        but="with sampling, or with a top_k of 0 or 1, it is without effect, as in stock `generate`",
    ),
    refused("dola_layers", "dola_layers asks for dola_generation, which speculate cannot do; leave it out"),
    idle("diversity_penalty", OF_BEAMS),
    idle("num_beam_groups", OF_BEAMS),
    refused("constraints", CONSTRAINED.format("constraints")),
    refused("force_words_ids", CONSTRAINED.format("force_words_ids")),
    # Where it comes from
    idle("_from_model_config", "says where the configuration comes from"),
    idle("transformers_version", "says where the configuration comes from"),
)


def refuse_settings(config: GenerationConfig, saved: GenerationConfig) -> None:
    """Raises `UserError` for what cannot be honoured of `config`, the merged one; `saved` is the model's own."""
    for setting in FIELDS:
        if setting.refuses(config, saved):
            raise UserError(setting.note)
    mode = config.get_generation_mode()  # whatever else later versions may do
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UserError(f"speculate cannot do {mode.value}; leave out the settings that ask for it")


# What `generate` prepared for the model, checked before it is read: mask, positions, cache, images.

# What `generate` prepares for every callable, and we make ourselves.
PREPARED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}
TEXT_TYPES = ("token_type_ids", "mm_token_type_ids")  # 0 says "text" in multimodal models
# Main inputs of the encoders that `generate` has run by then: image and video features lie under these names.
ENCODED = ("pixel_values", "pixel_values_images", "pixel_values_videos", "image_patches")
MEDIA = ("pixel_", "image", "video", "audio", "input_features", "input_values", "feature_attention_mask")


def refuse_inputs(model: PreTrainedModel, input_ids: torch.Tensor, prepared: dict[str, Any]) -> torch.Tensor:
    """The mask `int64 [B, T]` of the prompts' tokens. Raises `UserError` for inputs other than ids from position 0 on.

    What asks for nothing is let through: None, what is empty, and token types that say "text" everywhere.
    """
    if given(prepared.get("inputs_embeds")) or not input_ids.numel():
        raise UserError("speculate reads token ids, not embeddings; call generate with input_ids")
    for name in sorted(prepared.keys() - PREPARED):
        if asks(model, name, prepared[name]):
            raise refusal(model, name, prepared[name])
    cache = prepared.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise UserError("speculate reads the whole prompt itself; leave out past_key_values")
    mask = prompt_mask(input_ids, prepared.get("attention_mask"))
    refuse_positions(prepared.get("position_ids"), mask)
    return mask


def refuse_encoder(model: PreTrainedModel) -> None:
    """Raises `UserError` for encoder-decoder models, before their other inputs are looked at."""
    kind = model.config.model_type
    if model.config.is_encoder_decoder:
        raise UserError(f"{kind} is an encoder-decoder model; speculate needs a decoder-only causal LM")


def given(value: Any) -> bool:
    """Whether an input is given and not empty."""
    if isinstance(value, torch.Tensor):
        return value.numel() > 0
    if isinstance(value, dict):
        return any(given(part) for part in value.values())
    return value is not None and not (isinstance(value, Sized) and not len(value))


def asks(model: PreTrainedModel, name: str, value: Any) -> bool:
    """Whether this input would change what the model reads."""
    if name in TEXT_TYPES and isinstance(value, torch.Tensor):
        multimodal = model.config.get_text_config(decoder=True) is not model.config
        return bool(value.any()) or (name == "token_type_ids" and not multimodal)
    return given(value) and not (value is False and name.startswith("output_"))


def refusal(model: PreTrainedModel, name: str, value: Any) -> UserError:
    """Error message that names the input the user passed, of which `generate` may have made something else by now."""
    if name == "mm_encoder_outputs":
        kind = next(key for key, part in value.items() if given(part))
        encoder = getattr(model.base_model, f"get_{kind}_features", None)
        accepted = inspect.signature(encoder).parameters if encoder is not None else {}
        name = next((main for main in ENCODED if main in accepted), name)
    if name.startswith(MEDIA):
        return UserError(f"speculate reads text alone; leave out {name}")
    return UserError(f"speculate cannot hand {name} to the model; leave it out")


def prompt_mask(input_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`int64 [B, T]`, 1 for tokens and 0 for padding. Raises `UserError` where the last column is padding.

    There stock `generate` warns, and goes on from what the model says of a pad token.
    """
    if mask is None:
        return torch.ones_like(input_ids)
    mask = mask.to(input_ids.device)
    if mask.shape != input_ids.shape:
        shapes = f"{list(mask.shape)}, that of input_ids {list(input_ids.shape)}"
        raise UserError(f"the shape of attention_mask is {shapes}; give a 0 or 1 for each token")
    if not ((mask == 0) | (mask == 1)).all():
        raise UserError("attention_mask holds other values than 0 and 1; give a 1 for each token, 0 for padding")
    empty, ended = (mask == 0).all(1), mask[:, -1] == 0
    if empty.any():
        raise UserError(f"the attention mask of row {int(empty.int().argmax())} is all zeros; give it a token")
    if ended.any():
        raise UserError(
            f"row {int(ended.int().argmax())} is padded on the right: its attention mask, given or made from pad "
            'tokens, ends in 0; pad on the left (tokenizer.padding_side = "left")'
        )
    return mask.long()


def refuse_positions(positions: torch.Tensor | None, mask: torch.Tensor) -> None:
    """Raises `UserError` unless positions `[B, T]`, or each of several planes `[P, B, T]`, count tokens from 0.

    Models whose positions tell time, height and width apart get such planes, which are all the same for text.
    """
    if positions is None:
        return
    usual = mask.cumsum(-1) - 1
    planes = positions.to(usual)
    fits = planes.shape[-1] == usual.shape[1] and planes.shape[-2] in (1, len(usual)) and planes.dim() in (2, 3)
    if not fits or not ((planes == usual) | (mask == 0)).all():
        raise UserError("speculate counts positions from 0; leave out position_ids")
