"""Model card of a trained drafter, and its upload to the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import LocalTokenNotFoundError

from ctc_drafter.drafters.trainable import TrainableDrafter
from ctc_drafter.evaluate.figures import learning_curves, save
from ctc_drafter.files import SPACED, disk_errors, markdown_table, write_atomic
from ctc_drafter.provenance import MANIFEST, read_manifest, versions
from ctc_drafter.train.prompts import hub_name
from ctc_drafter.types import UserError, first_line

# Model card: README.md in the drafter's folder, with a plot of its training.

CARD, CURVES = "README.md", "training"
OURS = "<!-- written by ctc-drafter train; without this line it is left alone -->"
SIZES = ("num_hidden_layers", "frames", "draft_length", "draft_vocab_size", "target_layer_ids")


@dataclass(frozen=True)
class Made:
    """target, place: names or folders of target and drafter, as a user gives them. command: that trained it."""

    target: str
    place: str
    method: str
    command: str


def corpora(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The manifests of distillation folders; what has none is left out."""
    return [found for folder in folders if (found := read_manifest(folder / MANIFEST)) is not None]


def write_model_card(
    out: Path,
    drafter: TrainableDrafter,
    made: Made,
    history: Sequence[Mapping[str, float]],
    data: Sequence[Mapping[str, Any]],
) -> None:
    """Writes `out/README.md`, and `training.svg` and `training.png`. A README of somebody else's stays as it is.

    history: the trainer's log. data: manifests of the text that was learnt.
    """
    figure = learning_curves(history)
    with disk_errors(out):
        if figure is not None:
            save(figure, out, CURVES)
        card = out / CARD
        if not card.is_file() or OURS in card.read_text(encoding="utf-8"):
            picture = f"![loss and β during training]({CURVES}.png)\n\n" if figure is not None else ""
            write_atomic(card, [model_card(drafter, made, history, data, picture).rstrip()])


def model_card(
    drafter: TrainableDrafter,
    made: Made,
    history: Sequence[Mapping[str, float]],
    data: Sequence[Mapping[str, Any]],
    picture: str = "",
) -> str:
    """The card as Markdown; see `write_model_card`."""
    on_hub = not Path(made.target).exists() and "/" in made.target
    about = ModelCardData(
        base_model=made.target if on_hub else None,
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
    return source.get("name", "unknown"), source.get("licence", "unknown"), manifest.get("prompts", ""), writer


def _use(drafter: TrainableDrafter, made: Made) -> str:
    kind = type(drafter)
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from ctc_drafter import {kind.__name__}, speculate

model = AutoModelForCausalLM.from_pretrained("{made.target}")
tokenizer = AutoTokenizer.from_pretrained("{made.target}")
drafter = {kind.__name__}.from_pretrained("{made.place}")
inputs = tokenizer("Question: why is the sky blue?", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=128, custom_generate=speculate(drafter))
```

    ctc-drafter serve --target {made.target} --drafter {made.place}"""


# Finished drafters on the Hugging Face hub.

# Files to upload: no checkpoints, no features.
PUBLISHED = ("config.json", "model.safetensors", "README.md", "train.json", "train_log.jsonl", "training.*")


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
