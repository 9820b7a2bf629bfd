"""Training text of the quickstart target: which sources, how often, and the tokenizer made from them.

A corpus is a folder of `<source>.train.jsonl.gz` and `<source>.val.jsonl.gz` files whose records are
`{"source", "messages": [{"role", "content"}, ...]}` or `{"source", "text"}`.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ctc_drafter.types import UserError

# Source -> passes over it. Chosen for styles that a 15 M-parameter model can learn: short reasoning,
# question and answer, dialogue, Python. Large narrow sources are thinned, small good ones repeated.
MIX: dict[str, float] = {
    "gsm8k_train": 3.0,
    "arena_hard_openmodels": 2.0,
    "wildbench_phi3_responses": 1.5,
    "flan_cot": 1.5,
    "persona_chat": 1.5,
    "self_dialogue": 0.3,
    "sgd": 0.25,
    "taskmaster4": 1.0,
    "medquad": 0.6,
    "open_trivia": 0.7,
    "exercism_python": 3.0,
    "exercism_python_docs": 1.0,
    "thealgorithms_python": 1.0,
    "js_snippets": 1.0,
    "python_stdlib": 0.2,
    "d2l_en": 0.5,
    "rust_book": 0.5,
}

SPECIAL_TOKENS = ["<|bos|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>", "<|mask|>"]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def read_source(corpus: Path, source: str, split: str) -> list[dict[str, Any]]:
    """All records of one source. Raises `UserError` when the file is missing."""
    path = corpus / f"{source}.{split}.jsonl.gz"
    if not path.is_file():
        raise UserError(f"{corpus} has no {path.name}; give the folder that holds the corpus files")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def mixed_records(corpus: Path, seed: int) -> list[dict[str, Any]]:
    """The training records of `MIX`, repeated or thinned, in a shuffled order that `seed` fixes."""
    rng = random.Random(seed)
    records: list[dict[str, Any]] = []
    for source, passes in MIX.items():
        own = read_source(corpus, source, "train")
        rng.shuffle(own)
        whole, part = divmod(passes, 1.0)
        records += own * int(whole) + own[: int(part * len(own))]
    rng.shuffle(records)
    return records


def record_texts(record: dict[str, Any]) -> Iterator[str]:
    if "text" in record:
        yield record["text"]
    else:
        for message in record["messages"]:
            yield message["content"]


def train_tokenizer(records: list[dict[str, Any]], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with single digits, chat markers and a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text for record in records for text in record_texts(record)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        mask_token="<|mask|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def record_string(record: dict[str, Any]) -> str:
    """A record as the model sees it: the chat template for messages, markers around plain text."""
    if "text" in record:
        return f"<|bos|>{record['text']}<|end|>"
    turns = "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in record["messages"])
    return f"<|bos|>{turns}"


def pack(tokenizer: PreTrainedTokenizerFast, records: list[dict[str, Any]], length: int) -> torch.Tensor:
    """Records end to end, cut into rows: `int64 [rows, length]`; the last partial row is dropped."""
    strings = [record_string(record) for record in records]
    ids: list[int] = []
    for start in range(0, len(strings), 1024):
        for row in tokenizer(strings[start : start + 1024], add_special_tokens=False)["input_ids"]:
            ids += row
    rows = len(ids) // length
    return torch.tensor(ids[: rows * length]).view(rows, length)
