"""docs/families.md: which model families decode exactly and which are refused, on tiny random models.

`python -m benchmarks.families docs/families.md` writes the table. It is a report: what is accepted or
refused is decided by `target/checks.py` and `target/self_test.py`, which know no family.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from benchmarks.family_checks import stock_continuations
from benchmarks.family_sweep import every_family, outcome, sweep_page, way_of, without_figures
from ctc_drafter.decode.generate import generate
from ctc_drafter.drafters.base import Drafter
from ctc_drafter.drafters.ctc import CTCDrafter
from ctc_drafter.evaluate.exactness import ScriptedDrafter
from ctc_drafter.files import markdown_table
from ctc_drafter.target.checks import KERNELS, refuse_kind
from ctc_drafter.target.model import CACHES, Target
from ctc_drafter.types import UserError

PROMPTS = ((3, 1, 4, 1, 5, 9, 2, 6), (2, 7), (8, 2, 8, 1))
NEW_TOKENS = 12
NODES = 8
VOCABULARY = 97
WINDOW = 6  # shorter than the prompts, so that it matters
RIGHT: dict[str, int | tuple[int, ...]] = {"never": 0, "always": 4, "sometimes": (0, 3, 1, 4)}

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "initializer_range": 0.5,  # large: what a token sees must show in its logits
    "tie_word_embeddings": False,  # tied ones repeat the last token
}
GROUPED: dict[str, Any] = COMMON | {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
SLIDING: dict[str, Any] = {"sliding_window": WINDOW}
MIXED: dict[str, Any] = SLIDING | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT2_SIZES = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
OPT_SIZES = COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.5}
LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
UPPER_SLIDE = SLIDING | {"use_sliding_window": True, "max_window_layers": 1}
JAMBA_SIZES = {"num_experts": 2, "mamba_d_state": 4, "attn_layer_period": 2, "attn_layer_offset": 1}

# name, model type, sizes
FAMILIES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Llama", "llama", GROUPED),
    ("Qwen2", "qwen2", GROUPED),
    ("Qwen2, sliding from the second layer", "qwen2", GROUPED | UPPER_SLIDE),
    ("Qwen3", "qwen3", GROUPED),
    ("Mistral, sliding", "mistral", GROUPED | SLIDING),
    ("Gemma 2, soft caps", "gemma2", GROUPED | MIXED | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0}),
    ("Gemma 3", "gemma3_text", GROUPED | MIXED),
    ("Phi-3", "phi3", COMMON | {"num_key_value_heads": 2, "pad_token_id": 0}),
    ("Phi-3, sliding", "phi3", COMMON | {"num_key_value_heads": 2, "pad_token_id": 0} | SLIDING),
    ("GPT-2", "gpt2", GPT2_SIZES | {"initializer_range": 0.5}),
    ("GPT-NeoX", "gpt_neox", COMMON),
    ("OPT", "opt", OPT_SIZES),
    ("Mixtral", "mixtral", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("Qwen2-MoE", "qwen2_moe", GROUPED | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 16}),
    ("Falcon, rotary", "falcon", COMMON),
    ("OLMo 2", "olmo2", GROUPED),
    ("Cohere 2", "cohere2", GROUPED | MIXED),
    ("Granite", "granite", GROUPED),
    ("GPT-OSS", "gpt_oss", GROUPED | MIXED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("DeepSeek-V3", "deepseek_v3", COMMON | EXPERTS | LATENT),
    ("Falcon, alibi", "falcon", COMMON | {"alibi": True}),
    ("Bloom", "bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    ("MPT", "mpt", {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 3, "n_heads": 4}),
    ("RoBERTa", "roberta", COMMON | {"is_decoder": True}),
    ("Llama 4, chunked", "llama4_text", GROUPED | {"num_local_experts": 2, "intermediate_size_mlp": 48}),
    ("Mamba", "mamba", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 4}),
    ("Jamba", "jamba", GROUPED | JAMBA_SIZES),
    (
        "Qwen3-Next",
        "qwen3_next",
        GROUPED | EXPERTS | LINEAR | {"num_experts": 2, "shared_expert_intermediate_size": 16},
    ),
    ("BERT, bidirectional", "bert", COMMON),
    ("Moshi, sliding", "moshi", GROUPED | SLIDING | {"ffn_dim": 48}),
    ("RWKV", "rwkv", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3}),
    ("RecurrentGemma", "recurrent_gemma", GROUPED | {"lru_width": 32, "attention_window_size": WINDOW}),
    ("T5", "t5", {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}),
)


def family_config(name: str) -> PreTrainedConfig:
    """The tiny configuration of a family of this table."""
    model_type, sizes = next((kind, sizes) for known, kind, sizes in FAMILIES if known == name)
    return transformers.AutoConfig.for_model(model_type, **sizes)


def family_model(name: str, kernel: str | None = None) -> PreTrainedModel:
    """Random weights, the same each time. Raises transformers' own `ValueError` for a kernel it does not offer."""
    torch.manual_seed(2)
    return AutoModelForCausalLM.from_config(family_config(name), attn_implementation=kernel).eval()


def drafters(target: Target, texts: Sequence[Sequence[int]]) -> Iterator[Drafter]:
    """Drafts that are never, always and sometimes right, and those of an untrained CTC drafter."""
    for right in RIGHT.values():
        yield ScriptedDrafter(texts, right, target.vocab_size)
    torch.manual_seed(0)
    yield CTCDrafter.for_target(target.config, frames=5, draft_length=4, predictor_rank=8, predictor_width=16).eval()


def exact(target: Target, expected: Sequence[Sequence[int]], nodes: int = NODES) -> bool:
    """Whether every drafter, alone and in a batch of three rows, leaves the expected text as it was."""
    prompts = [list(prompt) for prompt in PROMPTS]
    texts = [prompt + list(text) for prompt, text in zip(prompts, expected, strict=True)]
    for rows in (1, len(prompts)):
        for drafter in drafters(target, texts):
            found = generate(target, drafter, prompts[:rows], max_new_tokens=NEW_TOKENS, nodes=nodes, eos=())
            if found.tokens != list(expected[:rows]):
                return False
    return True


@dataclass(frozen=True)
class Verdict:
    """refusal: the reason, or empty. cells: `(cache, kernel)` to `exact`, `DIFFERS`, `not offered` or `its own`.
    verified: by what drafts are, in words."""

    name: str
    refusal: str
    cells: dict[tuple[str, str], str]
    verified: str = ""


def verdict(name: str) -> Verdict:
    """Tries one family with every cache and kernel."""
    cells: dict[tuple[str, str], str] = {}
    expected: list[list[int]] = []
    verified = ""
    for kernel in KERNELS:
        try:
            refuse_kind(family_config(name))
            model = family_model(name, kernel)
            found = Target.wrap(model)
            others = [cache for cache in CACHES if cache != found.cache and found.chain is None]
            targets = {found.cache: found} | {cache: Target.wrap(model, cache) for cache in others}
        except UserError as error:
            return Verdict(name, str(error), {})
        except ValueError:  # transformers' word for a kernel that a family does not have
            cells |= {(cache, kernel): "not offered" for cache in CACHES}
            continue
        verified = way_of(found)
        expected = expected or stock_continuations(model, PROMPTS, NEW_TOKENS)
        cells |= {(cache, kernel): "its own" for cache in CACHES if cache not in targets}
        cells |= {(c, kernel): "exact" if exact(target, expected) else "DIFFERS" for c, target in targets.items()}
    return Verdict(name, "", cells, verified)


def page(verdicts: Sequence[Verdict]) -> str:
    """The page as Markdown."""
    columns = [(cache, kernel) for cache in CACHES for kernel in KERNELS]
    head = ["family", "verified by", *(f"{cache} cache, {kernel}" for cache, kernel in columns)]
    taken = [(v.name, v.verified, *(v.cells[c] for c in columns)) for v in verdicts if not v.refusal]
    refused = [(v.name, without_figures(v.refusal)) for v in verdicts if v.refusal]
    tables = [markdown_table(head, taken), "", REFUSED, "", markdown_table(["family", "refused because"], refused)]
    return "\n".join([HEAD, *tables]) + "\n"


HEAD = f"""# Model families

Written by `python -m benchmarks.families docs/families.md`; a test keeps it up to date.

Each family below was built tiny and random in float32, and decoded greedily: alone and in a batch of three prompts of
different lengths, with trees of {NODES} nodes, by drafters that are never, always and sometimes right and by an
untrained CTC drafter. *exact* means the same {NEW_TOKENS} tokens per prompt as transformers' own `generate`, every
time. Sliding windows are shorter than the prompts. *not offered*: transformers has no such kernel for the family.

No family is known by name. A target verifies *trees* when its configuration, its `forward` and its cache can serve a
token tree, and when a trial at load agrees with plain text: a tree of 7 nodes against its paths, and the step after its
compaction. So families that are not listed work, or are refused, by the same rule. Flash and flex attention are
refused: they take no tree mask. The trial is repeated at every length that the configuration names, over a cache that
is filled up to there.

What can follow no tree, recurrent and hybrid models above all, verifies *chains* in its own cache when another trial
agrees with transformers' `generate`: a chain of 5 behind a short prompt, rejected at every place in turn. *one row at a
time*: rows of different length are read one by one, since together they differ. *token by token*: recurrent layers are
read so, since they forget their state before several tokens.
"""
REFUSED = "Refused, each with its reason when it is loaded:"


def whole_page() -> str:
    """`docs/families.md`: the common families with every cache and kernel, then every type there is."""
    return page([verdict(name) for name, _, _ in FAMILIES]) + sweep_page([outcome(each) for each in every_family()])


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.families", description="Writes docs/families.md.")
    parser.add_argument("page", type=Path, help="file to write, docs/families.md")
    place = parser.parse_args(arguments).page
    place.write_text(whole_page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
