"""A tiny random Llama, its tokenizer and an untrained drafter, made on the spot."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import helpers
from ctc_drafter.drafters.ctc import CTCDrafter
from ctc_drafter.target.model import Target

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|mask|>"]


def tiny_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """All bytes, a few merges and the chat's special tokens: any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the hat"] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|end|>", chat_template=template
    )


def tiny_llama(seed: int = 0, context: int = 512, vocab_size: int = 280, layers: int = 2) -> LlamaForCausalLM:
    sizes = {"vocab_size": vocab_size, "num_hidden_layers": layers, "max_position_embeddings": context}
    return helpers.tiny_target(seed, **sizes, bos_token_id=0, eos_token_id=1).model


def tiny_chat_model(seed: int = 0, shift: float = 6.0) -> LlamaForCausalLM:
    """A `tiny_llama` that writes letters and ends its turns: their logits rise along what all hidden states share."""
    model, tokenizer = tiny_llama(seed), tiny_tokenizer()
    wanted = [tokenizer.eos_token_id, *tokenizer(" etaoinshrdlucmfwyp", add_special_tokens=False).input_ids]
    torch.manual_seed(seed)
    with torch.no_grad():
        model.model.embed_tokens.weight += 0.4  # a part that all states share
        states = model.model(torch.randint(280, (8, 64))).last_hidden_state.flatten(0, 1)
        mean = states.mean(0)
        model.lm_head.weight[wanted] += shift * mean / (states @ mean).mean()
    return model


def tiny_drafter(model: LlamaForCausalLM, seed: int = 1) -> CTCDrafter:
    sizes = {"frames": 4, "draft_length": 3, "predictor_rank": 8, "predictor_width": 16, "mask_token_id": 4}
    return helpers.tiny_drafter(Target.wrap(model), seed, **sizes)


def save_pair(folder: Path, template: str | None = TEMPLATE) -> tuple[Path, Path]:
    """Folders of a target with its tokenizer, and of its drafter."""
    model = tiny_llama()
    model.save_pretrained(folder / "target")
    tiny_tokenizer(template).save_pretrained(folder / "target")
    tiny_drafter(model).save_pretrained(folder / "drafter")
    return folder / "target", folder / "drafter"
