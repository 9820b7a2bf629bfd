"""Finished drafters on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError

from ctc_drafter.types import UserError

# Not checkpoints, not features.
PUBLISHED = ("config.json", "model.safetensors", "README.md", "train.json", "train_log.jsonl", "training.*")


def check_hub(repository: str) -> None:
    """Asks who is logged in, before hours of training. Raises `UserError` if nobody is, or for a bad name."""
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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"could not push to {repository}: {reason}; what was trained is kept: the same command tries again"
        ) from error
