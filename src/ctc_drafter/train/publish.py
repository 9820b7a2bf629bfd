"""A whole training run by names and folders, the model card of its drafter, and its upload to the hub."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import LocalTokenNotFoundError

from ctc_drafter.drafters.registry import blank_drafter, choose_vocabulary, fresh_drafter
from ctc_drafter.drafters.trainable import TrainableDrafter
from ctc_drafter.drafters.warm_start import Start
from ctc_drafter.files import SPACED, disk_errors, markdown_table, write_atomic
from ctc_drafter.load import default_target, load_config, load_target, read_template
from ctc_drafter.provenance import MANIFEST, check_writer, read_manifest, versions
from ctc_drafter.rows import hub_name
from ctc_drafter.target.names import HUB_ID, SMOLLM2, kind_of
from ctc_drafter.train.checkpoints import join_processes
from ctc_drafter.train.data import DistilledDataset, parts_of
from ctc_drafter.train.estimate import Plan, TextSize, memory_errors
from ctc_drafter.train.settings import TrainSettings
from ctc_drafter.train.trainer import Trained, train_drafter
from ctc_drafter.types import UserError, first_line, printable

logger = logging.getLogger(__name__)
Curves = Callable[[Sequence[Mapping[str, float]], Path], str | None]  # (log, folder) -> picture that was written there


# A whole training run, as `ctc-drafter train` makes it.


@dataclass(frozen=True)
class TrainJob:
    """What to train, and where. target, revision, trust_remote_code, tokenizer: as for `load_target`.

    data: folders of `distill`.

    sizes: of the drafter's config; those that are None are the method's. start: another drafter, to start from.
    held_out: share of rows for β. shard_target: see `train_drafter`. push_to_hub: `owner/name`. command: for the card.
    """

    data: Sequence[Path]
    out: Path
    settings: TrainSettings
    target: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    tokenizer: str | None = None
    method: str = "ctc"
    sizes: Mapping[str, Any] = field(default_factory=dict)
    start: Start | None = None
    max_length: int | None = None
    chat_template: Path | None = None
    held_out: float = 0.02
    shard_target: bool = False
    push_to_hub: str | None = None
    private: bool = False
    resume: bool = True
    dtype: str = "float32"
    device: str = "auto"
    command: str = ""

    def rows(self) -> tuple[DistilledDataset, DistilledDataset]:
        """To learn from, and held out."""
        return DistilledDataset.load(list(self.data), self.max_length).split(self.held_out)

    def drafter_sizes(self) -> dict[str, Any]:
        given = {name: size for name, size in self.sizes.items() if size is not None}
        return (self.start.sizes(self.method) if self.start else {}) | given

    def plan(self, rows: DistilledDataset) -> Plan:
        """What an estimate of the run needs; nothing but the target's configuration is loaded."""
        config, _, _ = load_config(self.target, self.revision, self.trust_remote_code, self.tokenizer)
        fresh = blank_drafter(self.method, **self.drafter_sizes())
        return Plan(config, getattr(torch, self.dtype), fresh, self.settings, TextSize.of(rows))


@dataclass(frozen=True)
class Finished:
    """trained: steps and log. address: of the drafter on the hub, if it was pushed."""

    trained: Trained
    address: str | None = None


def train_for_target(
    job: TrainJob, curves: Curves | None = None, warn: Callable[[str], None] = logger.warning
) -> Finished | None:
    """Trains a drafter for a target on its own answers; it lies in `job.out` then, with a model card.

    curves: draws the learning curves for the card. Raises `UserError` as what it calls: for text of another target, a
    folder of another run, too little memory, a hub that refuses. Returns None on all processes but the main one.
    """
    rows, held = job.rows()
    if job.push_to_hub:
        check_hub(job.push_to_hub)
    processes = join_processes(job.device)
    with memory_errors(lambda: job.plan(rows)):
        name = job.target or default_target()
        source = (job.revision, job.trust_remote_code, job.tokenizer)
        lm, tokenizer = load_target(
            name, job.dtype, "cpu" if job.shard_target else job.device, *source, packed=not job.shard_target
        )
        read_template(tokenizer, job.chat_template)
        check_writer(rows.manifest or {}, lm.model, tokenizer)
        if warning := rows.cut_warning():
            warn(warning)
        draft = fresh_drafter(lm, tokenizer, job.settings.seed, job.method, **job.drafter_sizes())
        choose_vocabulary(draft, rows.answer_counts(lm.vocab_size), lm.head, lm.embed)
        if job.start:
            job.start.give_to(draft)
        start = job.start.hash if job.start else ""
        trained = train_drafter(lm, draft, rows, held, job.out, job.settings, job.resume, job.shard_target, start)
    if not processes.is_main_process:
        return None
    made = Made(name, job.push_to_hub or str(job.out), job.method, job.command, job.revision)
    with disk_errors(job.out):
        picture = curves(trained.history, job.out) if curves else None
    write_model_card(job.out, draft, made, trained.history, corpora(job.data), picture)
    return Finished(trained, push(job.out, job.push_to_hub, job.private) if job.push_to_hub else None)


# What a finished drafter says of itself: README.md in its folder, with a picture of its training.

CARD = "README.md"
OURS = "<!-- written by ctc-drafter train; without this line it is left alone -->"
SIZES = ("num_hidden_layers", "frames", "draft_length", "draft_vocab_size", "target_layer_ids")


@dataclass(frozen=True)
class Made:
    """target, place: names or folders of target and drafter, as a user gives them. command: that trained it.

    revision: of the target, if it is a Hugging Face id.
    """

    target: str
    place: str
    method: str
    command: str
    revision: str | None = None


def corpora(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The manifests of distillation folders; what has none is left out."""
    parts = (part for folder in folders for part in parts_of(folder))
    return [found for part in parts if (found := read_manifest(part / MANIFEST)) is not None]


def write_model_card(
    out: Path,
    drafter: TrainableDrafter,
    made: Made,
    history: Sequence[Mapping[str, float]],
    data: Sequence[Mapping[str, Any]],
    curves: str | None = None,
) -> None:
    """Writes `out/README.md`. A README of somebody else's stays as it is.

    history: the trainer's log. data: manifests of the text that was learnt. curves: a picture of the log in `out`.
    """
    with disk_errors(out):
        card = out / CARD
        if not card.is_file() or OURS in card.read_text(encoding="utf-8"):
            picture = f"![loss and β during training]({curves})\n\n" if curves else ""
            write_atomic(card, [model_card(drafter, made, history, data, picture).rstrip()])


def model_card(
    drafter: TrainableDrafter,
    made: Made,
    history: Sequence[Mapping[str, float]],
    data: Sequence[Mapping[str, Any]],
    picture: str = "",
) -> str:
    """The card as Markdown; see `write_model_card`."""
    on_hub = kind_of(made.target) == "id" and "/" in made.target
    about = ModelCardData(
        base_model=HUB_ID if made.target == SMOLLM2 else made.target if on_hub else None,
        library_name="ctc-drafter",
        tags=["speculative-decoding", "drafter", made.method],
        datasets=[name for manifest in data if (name := hub_name((manifest.get("source") or {}).get("name", "")))]
        or None,
    )
    target = made.target if on_hub else Path(made.target).name
    sizes = [(key, getattr(drafter.config, key)) for key in SIZES if getattr(drafter.config, key, None)]
    sizes.append(("parameters", f"{sum(weight.numel() for weight in drafter.parameters()) / 1e6:.1f} M"))
    made_with = ", ".join(f"{name} {number}" for name, number in versions().items())
    return f"""---
{about.to_yaml()}
---

{OURS}

# A drafter for {target}

It drafts tokens that {target} verifies, so that decoding takes fewer steps and gives the same output. Method
`{made.method}`, for this target alone.

{markdown_table(["", ""], sizes, SPACED)}

## Figures

{_figures(history)}
{picture}## Text

The target's own answers to these prompts; a licence of prompts says nothing of the answers'.

{markdown_table(["prompts", "licence", "number", "written by"], map(_corpus, data), SPACED)}

## Training

    {made.command}

with {made_with}.

## Use

{_use(drafter, made)}
"""


def _figures(history: Sequence[Mapping[str, float]]) -> str:
    newest: dict[str, float] = {}
    for entry in history:
        newest.update(entry)
    if not newest:
        return "None were logged.\n"
    rows = [
        ("steps", f"{newest.get('step', 0):,.0f}"),
        ("tokens read", f"{newest.get('tokens', 0):,.0f}"),
        ("hours", f"{newest.get('seconds', 0) / 3600:.2f}"),
    ]
    named = {"loss": "loss, nats an anchor", "eval_loss": "held-out loss"}
    named |= {key: f"β, {key.removeprefix('eval_beta_')}" for key in newest if key.startswith("eval_beta_")}
    named |= {key: f"{key.removeprefix('eval_').replace('_', '-')} accuracy" for key in newest if "eval_top_" in key}
    rows += [(name, f"{newest[key]:.3f}") for key, name in named.items() if key in newest]
    return (
        "β: tokens that a verification emits, at held-out places of the target's text, by nodes of the tree.\n\n"
        + markdown_table(["", ""], rows, SPACED)
        + "\n"
    )


def _corpus(manifest: Mapping[str, Any]) -> tuple[Any, ...]:
    source = manifest.get("source") or {}
    dtype = f" in {manifest['dtype']}" if "dtype" in manifest else ", served"
    writer = f"{Path(str(manifest.get('target', 'unknown'))).name}{dtype}"
    said = [_as_text(source.get(key, "unknown")) for key in ("name", "licence")]
    return *said, manifest.get("prompts", ""), _as_text(writer)


def _as_text(value: object) -> str:
    """Text for Markdown: what a file calls itself must not become a link or an image of the card."""
    return re.sub(r"([\\`*\[\]<>#!])", r"\\\1", printable(str(value)))


def _use(drafter: TrainableDrafter, made: Made) -> str:
    kind = type(drafter)
    pin = f', revision="{made.revision}"' if made.revision else ""
    option = f" --revision {made.revision}" if made.revision else ""
    place, find = f'"{made.target}"', ""
    if kind_of(made.target) not in ("id", "a folder"):  # a file, or a name that transformers does not know
        place, find = "folder", f'folder = resolve("{made.target}")\n'
    imports = "from ctc_drafter.target.names import resolve\n" if find else ""
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from ctc_drafter import {kind.__name__}, speculate
{imports}
{find}model = AutoModelForCausalLM.from_pretrained({place}{pin})
tokenizer = AutoTokenizer.from_pretrained({place}{pin})
drafter = {kind.__name__}.from_pretrained("{made.place}")
inputs = tokenizer("Question: why is the sky blue?", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=128, custom_generate=speculate(drafter))
```

With the package installed, its name alone does too: `model.generate(**inputs, custom_generate="{made.place}",
trust_remote_code=True)` runs `custom_generate/generate.py` of this drafter.

    ctc-drafter serve --target {made.target}{option} --drafter {made.place}"""


# Finished drafters on the Hugging Face hub.

# Files to upload: no checkpoints, no features.
PUBLISHED = (
    *("config.json", "model.safetensors", "custom_generate/generate.py"),
    *("README.md", "train.json", "train_log.jsonl", "training.*"),
)


def check_hub(repository: str) -> None:
    """Checks the hub login, before hours of training. Raises `UserError` if nobody is, or for a bad name."""
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise UserError(f"{repository} is no repository of the hub; write owner/name")
    with _hub_errors(repository):
        HfApi().whoami()


def push(folder: Path, repository: str, private: bool = False) -> str:
    """Uploads a drafter's files to `owner/name`, which is made if need be; returns its address.

    Raises `UserError` if the hub cannot be reached or refuses.
    """
    with _hub_errors(repository):
        api = HfApi()
        place = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=list(PUBLISHED))
    return str(place)


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise UserError(f"nobody is logged in to push to {repository}; run hf auth login, or set HF_TOKEN") from error
    except Exception as error:  # the hub's, the network's and its client's have no kind in common
        reason = first_line(error)
        raise UserError(
            f"could not push to {repository}: {reason}; what was trained is kept: the same command tries again"
        ) from error
