"""The options of a training run."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ctc_drafter.types import UserError

# These change what is reported, kept or held in memory, not what is learnt: a resumed run may change them.
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
    loss_decay: float = Field(0.8, gt=0, le=1, description="weight of a draft's next token against the one before")
    copy_dropout: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of anchors that learn without copies, for engines where nobody knows the text",
    )
    anchors: int = Field(32, ge=1, description="positions of each row that a step learns from")
    anchor_chunk: int | None = Field(
        None, ge=1, description="positions whose logits are in memory at a time; by default some 256 MB of them"
    )
    recompute: bool = Field(False, description="gradient checkpointing: draft layers run again in the backward pass")
    features: Literal["online", "cached"] = Field(
        "online", description="whether the target computes them at each step, or once, into files"
    )
    features_limit: float | None = Field(None, gt=0, description="GB that those files may take")
    steps: int | None = Field(None, ge=1, description="optimizer steps; overrides epochs")
    epochs: float = Field(1.0, gt=0, description="passes over the training rows")
    batch_size: int = Field(8, ge=1, description="rows of a forward pass")
    accumulate: int = Field(1, ge=1, description="forward passes of a step, of all processes together")
    learning_rate: float = Field(1e-3, gt=0, description="peak of the cosine schedule")
    min_learning_rate: float = Field(0.0, ge=0, description="end of the cosine schedule")
    warmup_steps: int = Field(50, ge=0, description="steps of linear warmup")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's, on matrices only")
    adam_beta2: float = Field(0.95, gt=0, lt=1, description="AdamW's second decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    bf16: bool = Field(False, description="bfloat16 autocast; lattice and loss stay in float32")
    seed: int = Field(0, ge=0, description="of row order, anchors and held-out positions")
    log_every: int = Field(10, ge=1, description="steps between losses in the log")
    eval_every: int = Field(250, ge=1, description="steps between held-out losses and β")
    eval_nodes: tuple[int, ...] = Field((8, 16, 32, 64), min_length=1, description="tree sizes of the held-out β")
    eval_positions: int = Field(1024, ge=1, description="positions of the held-out β")
    eval_batch_size: int = Field(8, ge=1, description="rows of a held-out forward pass")
    save_every: int = Field(250, ge=1, description="steps between checkpoints")
    # The newest one is not sealed yet when older ones are deleted.
    keep_checkpoints: int = Field(2, ge=2, description="checkpoints that are kept")
    report_to: tuple[str, ...] = Field((), description="transformers' reporting integrations, e.g. tensorboard")
    progress: bool = Field(True, description="show a progress bar")

    @field_validator("eval_nodes", "report_to", mode="before")
    @classmethod
    def listed(cls, value: Any) -> Any:
        """One, as a command line gives it, is a list of one."""
        parts = value.split(",") if isinstance(value, str) else value
        return [part for part in parts if part != ""] if isinstance(parts, list) else parts

    @classmethod
    def parse(cls, values: dict[str, Any]) -> TrainSettings:
        """Raises `UserError` for an unknown key or a value out of range."""
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                raise UserError(f"unknown setting {name}; known are {', '.join(cls.model_fields)}") from error
            raise UserError(f"setting {name}: {first['msg']}") from error

    def learnt_from(self) -> dict[str, Any]:
        """The settings that a resumed run must share."""
        return self.model_dump(mode="json", exclude=FREE)
