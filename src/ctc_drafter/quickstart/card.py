"""The model card of the shipped pair: what it was trained on, how well it does, what it writes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from ctc_drafter.chat import decode, encode_conversation, eos_ids
from ctc_drafter.decode.generate import plain_generate
from ctc_drafter.drafters.ctc import CTCDrafter, CTCDrafterConfig
from ctc_drafter.load import load_drafter, load_target
from ctc_drafter.quickstart.corpus import MIX, read_source
from ctc_drafter.quickstart.pretrain import PERPLEXITY, PHASES, TOKENS_PER_STEP
from ctc_drafter.target.model import Target
from ctc_drafter.train.data import DistilledDataset
from ctc_drafter.train.validate import offline_beta

SOURCES = {
    "gsm8k_train": ("openai/grade-school-math", "MIT"),
    "arena_hard_openmodels": ("lmarena/arena-hard-auto, answers of open models", "Apache-2.0"),
    "wildbench_phi3_responses": ("allenai/WildBench, answers of Phi-3-mini", "Apache-2.0"),
    "flan_cot": ("google-research/FLAN, chain-of-thought sets", "Apache-2.0; parts MIT, CC-BY 4.0, CC-BY-SA 4.0"),
    "persona_chat": ("google-research-datasets/Synthetic-Persona-Chat", "CC-BY 4.0"),
    "self_dialogue": ("jfainberg/self_dialogue_corpus", "BSD-3-Clause"),
    "sgd": ("google-research-datasets/dstc8-schema-guided-dialogue", "CC-BY-SA 4.0"),
    "taskmaster4": ("google-research-datasets/Taskmaster, TM-4-2024", "CC-BY 4.0"),
    "medquad": ("abachaa/MedQuAD", "CC-BY 4.0"),
    "open_trivia": ("uberspot/OpenTriviaQA", "CC-BY-SA 4.0"),
    "exercism_python": ("exercism/python", "MIT"),
    "exercism_python_docs": ("exercism/python, documents", "MIT"),
    "thealgorithms_python": ("TheAlgorithms/Python", "MIT"),
    "js_snippets": ("30-seconds/30-seconds-of-code", "CC0-1.0"),
    "python_stdlib": ("CPython 3.11, Lib", "PSF-2.0"),
    "d2l_en": ("d2l-ai/d2l-en", "CC-BY-SA 4.0; code MIT-0"),
    "rust_book": ("rust-lang/book", "MIT or Apache-2.0"),
}

SAMPLE_TOKENS = 96
BETA_POSITIONS = 3000

SIBLINGS = """
These answers were held out one by one: other parts of some of the texts that they carry on were trained on.
"""

HEAD = """# Quickstart target and drafter

Trained from random weights by `make quickstart CORPUS=folder`; no other model's weights are in them. `target/` is a
Llama of {target_m:.1f} M parameters (8 layers of width 384, 8,192-token byte-level BPE, context 1,024) that exists to
show and to test speculative decoding without a network. It is far too small to be right about anything: do not use
its answers. Decoded greedily it often falls into loops, which are easy to draft, so that acceptance lengths measured
on it say little about larger targets. `drafter/` is its CTC drafter of {drafter_m:.1f} M parameters, trained only on
text that the target itself wrote. Both are stored in bfloat16.
"""


def write_card(corpus: Path, work: Path, out: Path, trainings: Sequence[Path], held_out: DistilledDataset) -> None:
    """Writes `out/README.md` from the run's own figures, the packaged drafter's β and ten samples of its target.

    trainings: folders of the drafter's, the one going on where the other ended.
    """
    perplexity = json.loads((work / PERPLEXITY).read_text())
    logs = ((folder / "train_log.jsonl").read_text().splitlines() for folder in trainings)
    steps = [json.loads(log[-1])["step"] for log in logs]
    sizes = {f"{part}_m": parameters(out / part / "model.safetensors") / 1e6 for part in ("target", "drafter")}
    target, tokenizer = load_target(str(out / "target"), "float32", "cpu")
    drafter = cast(CTCDrafter, load_drafter(str(out / "drafter"), target, tokenizer))
    alone = cast(CTCDrafter, load_drafter(str(out / "drafter"), target, tokenizer))
    alone.config.copies = 0
    beta = {
        copies: offline_beta(target, each, held_out, max_positions=BETA_POSITIONS, max_rows=len(held_out))
        for copies, each in (("yes", drafter), ("no", alone))
    }
    siblings = any(row.source is None for row in held_out.rows)
    drafted = beta_table(steps, drafter.config, beta) + (SIBLINGS if siblings else "")
    parts = [HEAD.format(**sizes), data_table(perplexity), drafted, *samples(corpus, target, tokenizer)]
    (out / "README.md").write_text("\n".join(parts), encoding="utf-8")


def parameters(file: Path) -> int:
    with safe_open(file, framework="pt") as tensors:
        names = list(tensors.keys())
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)


def data_table(perplexity: dict[str, float]) -> str:
    rows = ["## Training text\n", "| source | passes | licence | held-out perplexity |", "|---|---|---|---|"]
    for source, passes in MIX.items():
        origin, licence = SOURCES[source]
        rows.append(f"| {origin} | {passes:g} | {licence} | {perplexity.get(source, '')} |")
    seen = sum(phase.steps for phase in PHASES) * TOKENS_PER_STEP / 1e6
    rows += [f"\nTraining saw {seen:.1f} M tokens of this mixture. Perplexity is per token, on held-out documents,"]
    return "\n".join([*rows, "in float32.\n"])


def beta_table(steps: Sequence[int], config: CTCDrafterConfig, figures: dict[str, dict[str, float]]) -> str:
    """figures: whether it copies -> what `offline_beta` found."""
    beta = {
        copies: {name.removeprefix("beta_"): value for name, value in found.items() if name.startswith("beta_")}
        for copies, found in figures.items()
    }
    sizes = next(iter(beta.values()))
    rows = [
        f"## The drafter after {' and '.join(f'{count:,}' for count in steps)} steps\n",
        f"It drafts {config.draft_vocab_size:,} of the {config.vocab_size:,} tokens, the most frequent in the answers",
        f"that it learnt from, and knows where the text agrees with up to {config.copies} of the newest tokens. The",
        "second training left that out at half of its places, for engines that do not know the text. Tokens",
        f"per verification at {BETA_POSITIONS:,} places of held-out answers of the target, by nodes of the tree:\n",
        "| with copies | " + " | ".join(sizes) + " |",
        "|---" * (1 + len(sizes)) + "|",
        *(
            f"| {copies} | " + " | ".join(f"{found[name]:.2f}" for name in sizes) + " |"
            for copies, found in beta.items()
        ),
    ]
    return "\n".join(rows) + "\n"


def samples(corpus: Path, target: Target, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Ten unedited greedy answers to held-out prompts, the first of each source in turn."""
    questions = []
    for take in range(2):
        for source in MIX:
            rows = [row for row in read_source(corpus, source, "val") if "messages" in row]
            if take < len(rows):
                questions.append(rows[take]["messages"][0]["content"])
    texts = ["## Ten samples, unedited\n"]
    fitting = [q for q in questions if len(q) < 600][:10]
    for question in fitting:
        prompt = encode_conversation(tokenizer, [question])
        result = plain_generate(target, [prompt], max_new_tokens=SAMPLE_TOKENS, eos=eos_ids(target.model, tokenizer))
        texts += ["**User**\n", quoted(question), "\n**Target**\n", quoted(decode(tokenizer, result.tokens[0])), ""]
    return texts


def quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.strip().splitlines())
