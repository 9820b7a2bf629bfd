"""Settings of transformers' `generate` and inputs of the model: honoured, refused, or without effect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from transformers import GenerationConfig
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

# What `Speculator.generate` does with its arguments where that is not what a callable can do.
SPECULATOR = (
    honoured("streamer", "of one row; tokens that are shown are final"),
    honoured("stop_strings", "as in stock `generate`, with the model's `tokenizer`"),
    honoured("tokenizer", "read by stop_strings"),
    refused("token_healing", "token_healing changes the prompt; leave it out"),
    refused("assistant_model", "a Speculator has a drafter already; leave out assistant_model"),
    refused("assistant_tokenizer", "a Speculator has a drafter already; leave out assistant_tokenizer"),
    refused("custom_generate", "a Speculator decodes itself; leave out custom_generate, or call the model's generate"),
    refused("synced_gpus", "rows never wait for another process; leave out synced_gpus, or call the model's generate"),
    refused("cache_implementation", 'cache_implementation="paged" would batch without drafts; leave it out'),
)

# What a model may be given beside the settings. Anything else is refused by its name.
PICTURES = "the prompt is read by one forward, as in stock `generate`; refused where drafts are chains, not trees"
INPUTS = (
    honoured("input_ids", "token ids `[B, T]`; padding on the left"),
    honoured("attention_mask", "0 and 1, `[B, T]`; rows that end in 0 (padding on the right) are refused"),
    honoured("position_ids", "the usual ones, which `generate` makes; beside pictures any, else others are refused"),
    honoured("past_key_values", "an empty cache, which stays empty; one in use is refused"),
    refused("inputs_embeds", "speculate reads token ids, not embeddings; call generate with input_ids"),
    honoured("pixel_values", f"images, with whatever the processor gives beside them; {PICTURES}"),
    honoured("pixel_values_videos", f"videos, with whatever the processor gives beside them; {PICTURES}"),
    refused("input_features", "speculate reads text and pictures, no sound; leave out input_features"),
    honoured("token_type_ids", "as the processor makes them; without pictures others than zeros are refused"),
    honoured("mm_token_type_ids", "as the processor makes them; without pictures others than zeros are refused"),
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
