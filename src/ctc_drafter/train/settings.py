"""Training settings (`TrainSettings`): hyperparameters, evaluation, checkpoints, logging."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

# Without torch at import time: `ctc-drafter train --help` is made of these settings.

# They affect reports, checkpoints or memory, not the trained weights: a resumed run may change them.
FREE = {
    "log_every",
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "eval_nodes",
    "eval_positions",
    "eval_batch_size",
    "report_to",
    "progress",
    "anchor_chunk",
    "recompute",
    "features",
    "features_limit",
}


class TrainSettings(BaseModel):
    """Settings of `train_drafter`. Use `TrainSettings.parse` for values that a user typed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    loss: Literal["prefix", "ctc", "teacher"] = Field(
        "prefix", description="prefix likelihood, full-sequence CTC, or the target's probabilities as the teacher"
    )
    loss_decay: float = Field(0.8, gt=0, le=1, description="weight of each drafted token relative to the one before")
    copy_dropout: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of anchors trained without copies, for engines that do not pass the text to the drafter",
    )
    anchors: int = Field(32, ge=1, description="positions of each row whose continuations are trained per step")
    anchor_chunk: int | None = Field(
        None, ge=1, description="positions whose logits are in memory at a time; by default about 256 MB"
    )
    recompute: bool = Field(False, description="gradient checkpointing: draft layers run again in the backward pass")
    features: Literal["online", "cached"] = Field(
        "online", description="target features: computed at every step, or cached in files"
    )
    features_limit: float | None = Field(None, gt=0, description="disk limit of the feature cache in GB")
    steps: int | None = Field(None, ge=1, description="optimizer steps; overrides epochs")
    epochs: float = Field(1.0, gt=0, description="passes over the training rows")
    batch_size: int = Field(8, ge=1, description="rows per forward pass")
    accumulate: int = Field(1, ge=1, description="forward passes per optimizer step, over all processes")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="AdamW, or Muon for the matrices of hidden layers and AdamW for the rest"
    )
    learning_rate: float = Field(1e-3, gt=0, description="peak of the cosine schedule")
    min_learning_rate: float = Field(0.0, ge=0, description="end of the cosine schedule")
    warmup_steps: int = Field(50, ge=0, description="steps of linear warmup")
    weight_decay: float = Field(0.01, ge=0, description="weight decay of AdamW, on matrices only")
    adam_beta2: float = Field(0.95, gt=0, lt=1, description="second beta of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping norm")
    bf16: bool = Field(False, description="bfloat16 autocast; lattice and loss stay in float32")
    seed: int = Field(0, ge=0, description="random seed of row order, anchors and held-out positions")
    log_every: int = Field(10, ge=1, description="steps between losses in the log")
    eval_every: int = Field(250, ge=1, description="steps between validations: held-out loss and tokens per step (β)")
    eval_nodes: tuple[int, ...] = Field(
        (8, 16, 32, 64), min_length=1, description="tree sizes for which held-out tokens per step (β) are estimated"
    )
    eval_positions: int = Field(1024, ge=1, description="held-out positions used to estimate tokens per step (β)")
    eval_batch_size: int = Field(8, ge=1, description="rows per held-out forward pass")
    save_every: int = Field(250, ge=1, description="steps between checkpoints")
    # At least 2: older checkpoints are deleted before the newest one is marked as complete.
    keep_checkpoints: int = Field(2, ge=2, description="number of checkpoints to keep")
    report_to: tuple[str, ...] = Field((), description="transformers' reporting integrations, e.g. tensorboard")
    progress: bool = Field(True, description="show a progress bar")

    @field_validator("eval_nodes", "report_to", mode="before")
    @classmethod
    def listed(cls, value: Any) -> Any:
        """Splits comma-separated text into a list."""
        parts = value.split(",") if isinstance(value, str) else value
        return [part for part in parts if part != ""] if isinstance(parts, list) else parts

    @classmethod
    def parse(cls, values: dict[str, Any]) -> TrainSettings:
        """Raises `UserError` for an unknown key or a value out of range."""
        from ctc_drafter.types import UserError

        try:
            return cls(**cls.known(values))
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise UserError(f"setting {name}: {first['msg']}") from error

    @classmethod
    def known(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The values. Raises `UserError` for an unknown key, and where they are no settings at all."""
        from ctc_drafter.types import UserError

        if not isinstance(values, dict):
            raise UserError(f"settings are {values}; give NAME: VALUE pairs")
        for name in values:
            if name not in cls.model_fields:
                raise UserError(f"unknown setting {name}; known are {', '.join(cls.model_fields)}")
        return values

    def learnt_from(self) -> dict[str, Any]:
        """The settings that must not change when a run is resumed."""
        return self.model_dump(mode="json", exclude=FREE)
