"""Builds the shipped target and drafter: `python -m recipes.quickstart.build CORPUS`.

pretrain the target -> let it answer training prompts -> train the drafter on those answers -> train it on, half of the
time without copies -> package both.
Every step resumes where it was killed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.pages import run_alone
from ctc_drafter.chat import decode, encode_conversation, eos_ids
from ctc_drafter.decode.generate import plain_generate
from ctc_drafter.drafters.ctc import CTCDrafter, CTCDrafterConfig
from ctc_drafter.drafters.registry import choose_vocabulary, fresh_drafter
from ctc_drafter.files import markdown_table
from ctc_drafter.load import load_drafter, load_target
from ctc_drafter.provenance import tensors_hash
from ctc_drafter.quickstart import MODEL_DIR
from ctc_drafter.target.model import Target
from ctc_drafter.train.data import DistilledDataset
from ctc_drafter.train.distill import distill
from ctc_drafter.train.prompts import read_prompts
from ctc_drafter.train.settings import TrainSettings
from ctc_drafter.train.trainer import train_drafter
from ctc_drafter.train.validate import offline_beta
from recipes.quickstart.pretrain import MIX, PERPLEXITY, PHASES, TOKENS_PER_STEP, pretrain, read_source

# What the target answers: folder -> rows of the corpus. Reasoning and long prose are hard to draft and need more
# text than small talk, so they are also carried on from inside their answers.
PROMPTS: dict[str, dict[str, Any]] = {
    "wide": {"pattern": "*.train.*", "per_file": 1500},
    "reasoning": {"pattern": "gsm8k*.train.*"},
    "reasoning-cut": {"pattern": "gsm8k*.train.*", "cuts": 3},
    "prose-cut": {"pattern": "wildbench*.train.*", "cuts": 6},
    "chat-cut": {"pattern": "arena_hard*.train.*", "cuts": 6},
    "instructions": {"pattern": "flan_cot*.train.*", "per_file": 6000},
}
ANSWER_TOKENS = 128
HELD_OUT = 0.02
DRAFTER: dict[str, Any] = {
    "frames": 8,
    "draft_length": 7,
    "num_hidden_layers": 1,
    "predictor_rank": 64,
    "predictor_width": 256,
    "carry": True,
    "copies": 16,
    "lookup_length": 15,
    # Of 8,192 tokens: the rest is half a percent of what the target writes, and most of what a draft costs.
    "draft_vocab_size": 3072,
}
TRAINING = TrainSettings.parse(
    {
        "steps": 5000,
        "batch_size": 16,
        "anchors": 32,
        "learning_rate": 2e-3,
        "min_learning_rate": 2e-5,
        "bf16": True,
        "eval_every": 500,
        "eval_positions": 512,
    }
)
# Engines that do not know the text draft without copies, so half of what it learns now is to do without.
MIXED = TRAINING.model_copy(update={"steps": 2500, "learning_rate": 1e-3, "copy_dropout": 0.5, "seed": 1})
FINISHED = "drafter-mixed"


def build(
    corpus: Annotated[Path, typer.Argument(help="Folder of <source>.train.jsonl.gz and <source>.val.jsonl.gz files.")],
    work: Annotated[Path, typer.Option(help="Folder for checkpoints and distilled text.")] = Path("runs/quickstart"),
    out: Annotated[Path, typer.Option(help="Output folder of the finished model.")] = MODEL_DIR,
) -> None:
    """Trains the quickstart target and drafter from a folder of text and packages them."""
    target_dir = work / "target"
    if not (work / PERPLEXITY).is_file():
        pretrain(corpus, work)
    target, tokenizer = load_target(str(target_dir), "bfloat16", "auto")
    folders, known = [work / "distilled" / name for name in PROMPTS], set[str]()
    for folder, rows in zip(folders, PROMPTS.values(), strict=True):
        found = read_prompts(corpus, tokenizer, max_prompt_tokens=512, **rows).prompts
        prompts = [prompt for prompt in found if prompt.id not in known]
        known |= {prompt.id for prompt in prompts}
        distill(target, tokenizer, prompts, folder, max_new_tokens=ANSWER_TOKENS, batch_size=64, name="quickstart")
    train_rows, held_out = DistilledDataset.load(folders).split(HELD_OUT)
    drafter = fresh_drafter(target, tokenizer, seed=0, **DRAFTER)
    choose_vocabulary(drafter, train_rows.answer_counts(target.vocab_size), target.head)
    train_drafter(target, drafter, train_rows, held_out, work / "drafter", TRAINING)
    start = tensors_hash(drafter.state_dict().items())
    train_drafter(target, drafter, train_rows, held_out, work / FINISHED, MIXED, start=start)
    package(corpus, work, out)


def package(corpus: Path, work: Path, out: Path) -> None:
    """Both models in bfloat16, the tokenizer and the model card."""
    _, held_out = DistilledDataset.load([work / "distilled" / name for name in PROMPTS]).split(HELD_OUT)
    AutoModelForCausalLM.from_pretrained(work / "target", dtype=torch.bfloat16).save_pretrained(out / "target")
    AutoTokenizer.from_pretrained(work / "target").save_pretrained(out / "target")
    CTCDrafter.from_pretrained(work / FINISHED).to(torch.bfloat16).save_pretrained(out / "drafter")
    write_card(corpus, work, out, [work / "drafter", work / FINISHED], held_out)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {size / 1e6:.1f} MB")


# The model card of the shipped pair: what it was trained on, how well it does, what it writes.

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
    rows = []
    for source, passes in MIX.items():
        origin, licence = SOURCES[source]
        rows.append((origin, f"{passes:g}", licence, perplexity.get(source, "")))
    seen = sum(phase.steps for phase in PHASES) * TOKENS_PER_STEP / 1e6
    return f"""## Training text

{markdown_table(["source", "passes", "licence", "held-out perplexity"], rows)}

Training saw {seen:.1f} M tokens of this mixture. Perplexity is per token, on held-out documents,
in float32.
"""


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
        markdown_table(
            ["with copies", *sizes],
            ((copies, *(f"{found[name]:.2f}" for name in sizes)) for copies, found in beta.items()),
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


if __name__ == "__main__":
    run_alone(build)
