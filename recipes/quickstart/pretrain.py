"""Pretrains the shipped target, a small Llama, from random weights."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ctc_drafter.files import write_atomic
from ctc_drafter.types import UserError

VOCAB_SIZE = 8192
HEAD_DIM = 64
PERPLEXITY = "perplexity.json"  # written last: with it a target is whole
CONTEXT = 1024
TOKENS_PER_STEP = 8192


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama whose heads have 64 numbers, with tied embeddings."""

    layers: int
    width: int
    inner: int
    kv_heads: int = 2


SHIPPED = Shape(layers=8, width=384, inner=896)  # 14.6 M parameters with an 8k vocabulary


def target_config(tokenizer: PreTrainedTokenizerFast, shape: Shape = SHIPPED) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // HEAD_DIM,
        num_key_value_heads=shape.kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class PackedRows(Dataset[dict[str, torch.Tensor]]):
    """Rows of `int64 [rows, length]` as causal LM examples."""

    def __init__(self, rows: torch.Tensor):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class CompiledLossTrainer(Trainer):
    """Compiles model and loss as one graph: the logits are then never stored in float32."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if not hasattr(self, "_compiled_loss"):
            self._compiled_loss = torch.compile(lambda m, ids: m(input_ids=ids, labels=ids).loss)
        ids = inputs["input_ids"]
        with torch.autocast(ids.device.type, torch.bfloat16):
            return self._compiled_loss(model, ids)


@dataclass(frozen=True)
class Phase:
    """A stretch of training on rows of one length, 8,192 tokens a step."""

    name: str
    length: int
    steps: int
    warmup: int
    peak: float
    min_probability: float


# Attention over 512 tokens is much cheaper on a CPU; the short second phase teaches the whole context.
PHASES = (
    Phase("short", length=512, steps=1500, warmup=100, peak=2e-3, min_probability=2e-4),
    Phase("long", length=CONTEXT, steps=150, warmup=0, peak=2e-4, min_probability=1e-5),
)


def pretrain(
    corpus: Path, work: Path, phases: tuple[Phase, ...] = PHASES, seed: int = 0, shape: Shape = SHIPPED
) -> Path:
    """Trains tokenizer and target into `work/target`; resumes from the newest checkpoint in `work`.

    A tokenizer that lies in `work/tokenizer` is used. Returns the folder of the finished target.
    """
    out = work / "target"
    records = mixed_records(corpus, seed)
    tokenizer_dir = work / "tokenizer"
    if not (tokenizer_dir / "tokenizer_config.json").is_file():
        train_tokenizer(records, VOCAB_SIZE).save_pretrained(tokenizer_dir)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)

    torch.manual_seed(seed)
    model = LlamaForCausalLM(target_config(tokenizer, shape))
    for phase in phases:
        train_phase(model, PackedRows(pack(tokenizer, records, phase.length)), phase, work / phase.name, seed)

    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    perplexity = validation_perplexity(model.float(), tokenizer, corpus)
    write_atomic(work / PERPLEXITY, [json.dumps(perplexity, indent=2)])
    return out


def train_phase(model: LlamaForCausalLM, rows: PackedRows, phase: Phase, work: Path, seed: int) -> None:
    args = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=TOKENS_PER_STEP // phase.length,
        max_steps=phase.steps,
        learning_rate=phase.peak,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": phase.min_probability},
        warmup_steps=phase.warmup,
        weight_decay=0.1,
        adam_beta2=0.95,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=20,
        save_steps=150,
        save_total_limit=2,
        report_to=[],
        seed=seed + phase.length,
    )
    trainer = CompiledLossTrainer(model=model, args=args, train_dataset=rows)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work)) if work.is_dir() else None)


@torch.inference_mode()
def validation_perplexity(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Path
) -> dict[str, float]:
    """Perplexity per token of each source's held-out split, in packed rows of the whole context."""
    result = {}
    for source in MIX:
        rows = pack(tokenizer, read_source(corpus, source, "val"), 256)[:64]
        if len(rows):
            losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in rows.split(16)]
            result[source] = round(math.exp(sum(losses) / len(rows)), 2)
    return result


# Training text of the quickstart target: which sources, how often, and the tokenizer made from them.
#
# A corpus is a folder of `<source>.train.jsonl.gz` and `<source>.val.jsonl.gz` files whose records are
# `{"source", "messages": [{"role", "content"}, ...]}` or `{"source", "text"}`.

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
