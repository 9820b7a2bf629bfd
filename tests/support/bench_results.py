"""A results file as `bench` writes it, of made-up figures, for tests of the report."""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any

from ctc_drafter.evaluate.methods import BINS
from ctc_drafter.evaluate.results import Record, histogram, row_of

# β of a chain; trees gain
STRENGTH = {
    "ctc": 3.4,
    "ctc-paper": 2.9,
    "medusa": 2.5,
    "hydra": 3.0,
    "dspark": 3.3,
    "eagle": 3.6,
    "prompt_lookup": 1.6,
}
SIZES = ("chain", 8, 16, 32, 64)
TASKS = {"mt_bench": ("writing", "math", "coding", "reasoning", "roleplay"), "gsm8k": ("gsm8k",)}


def made_up(
    prompts: int = 20, methods: dict[str, float] | None = None, sizes: tuple[int | str, ...] = SIZES
) -> dict[str, Any]:
    """`{"meta", "rows", "records"}`."""
    rng = random.Random(0)
    rows, records = [], []
    for task, categories in TASKS.items():
        keys = [("plain", None), *((method, size) for method in methods or STRENGTH for size in sizes)]
        own = {key: [one(rng, task, i, categories, key, methods or STRENGTH) for i in range(prompts)] for key in keys}
        for key, found in own.items():
            row = row_of(task, key, found, own["plain", None])
            row["stages_ms"] = {"verify": 4 + rng.random()}
            if key[0] != "plain":
                row["stages_ms"] |= {"draft": 1 + 2 * rng.random(), "tree": 0.3, "accept": 0.2, "compact": 0.4}
                nodes = [1000 / (i + 1) for i in range(BINS)]
                promised = [count * (i + 0.5) / BINS for i, count in enumerate(nodes)]
                row["calibration"] = {"nodes": nodes, "predicted": promised, "accepted": [0.9 * p for p in promised]}
            rows.append(row)
            records += [asdict(record) for record in found]
    hardware = {"cpu": "Some Processor", "cores": 2, "memory_gb": 8.0, "gpu": None}
    meta = {"commit": "0123456789abcdef", "hardware": hardware, "threads": 2, "dtype": "float32", "batch_size": 1}
    spent = {"steps": 600, "tokens": 1_234_567, "seconds": 330.0}
    facts = {
        name: {"method": name, "parameters": 1_500_000, "draft_length": 7, "training": spent}
        for name in methods or STRENGTH
    }
    meta |= {"max_new_tokens": 128, "complete": True, "drafters": facts}
    return {"meta": meta, "rows": rows, "records": records}


def one(
    rng: random.Random, task: str, index: int, categories: tuple[str, ...], key: Any, strength: dict[str, float]
) -> Record:
    category = categories[index % len(categories)]
    if key[0] == "plain":
        return Record(
            task, index, f"{task}/{index}", category, *key, 1, 100, 99, 0.5 + 0.01 * rng.random(), True, False, [99]
        )
    gain = SIZES.index(key[1]) * 0.35
    steps = int(99 / (strength[key[0]] + gain + rng.uniform(-0.4, 0.4)))
    accepted = [rng.randrange(8) for _ in range(steps)]
    seconds = steps * 0.008
    return Record(
        task, index, f"{task}/{index}", category, *key, 1, 100, steps, seconds, True, False, histogram(accepted)
    )
