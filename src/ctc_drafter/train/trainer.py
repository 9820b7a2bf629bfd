"""Trains a drafter on distilled text with `transformers.Trainer`. The frozen target gives features as it goes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from ctc_drafter.drafters.trainable import AnchorBatch, TrainableDrafter
from ctc_drafter.files import disk_errors, write_atomic
from ctc_drafter.provenance import check_writer, claim, config_hash, digest, read_manifest, versions, weights_hash
from ctc_drafter.target.model import Target
from ctc_drafter.train.checkpoints import (
    DueCheckpoints,
    Stopped,
    join_processes,
    latest_checkpoint,
    remove_unsealed,
    seal,
    shard_layers,
    share_of,
    tensors_alone,
    trainer_state,
    unsealed,
)
from ctc_drafter.train.data import EMPTY_ROW, DistilledDataset, LengthSampler, collate
from ctc_drafter.train.feature_cache import FeatureFiles, WithFeatures
from ctc_drafter.train.objective import anchor_copies, anchor_counts, draw_anchors, label_anchors, loss_options
from ctc_drafter.train.optimizer import muon_and_adamw
from ctc_drafter.train.progress import TrainingProgress
from ctc_drafter.train.settings import FREE, TrainSettings
from ctc_drafter.train.temperature import fit_temperature
from ctc_drafter.train.validate import draft_positions, offline_beta
from ctc_drafter.types import UserError

RUN_FILE = "train.json"
LOG_FILE = "train_log.jsonl"
OF_A_RUN = {"target", "drafter", "rows"}  # what every version has written to the run's file


@dataclass(frozen=True)
class Trained:
    """steps: optimizer steps in all, resumed ones included. history: the log, one entry per report."""

    steps: int
    history: list[dict[str, float]]


def train_drafter(
    target: Target,
    drafter: TrainableDrafter,
    dataset: DistilledDataset,
    held_out: DistilledDataset | None,
    out: Path,
    settings: TrainSettings,
    resume: bool = True,
    shard_target: bool = False,
    start: str = "",
) -> Trained:
    """Trains `drafter` in place and saves it to `out`; checkpoints lie in `out/checkpoints`.

    The same call after a crash goes on from the newest whole checkpoint and gives the same losses as an
    unbroken run; so does any number of processes, which share the forward passes of a step (`settings.accumulate`).
    With `shard_target` they share the weights of the target's layers too. `start`: a hash of the weights that the
    drafter starts from, if these are another drafter's; the same call must name the same.

    SIGTERM and Ctrl-C end it behind the step with a checkpoint (`Stopped`).

    The log holds `loss`, `seconds` and `tokens` so far, and with `held_out` rows `eval_loss`, `eval_beta_chain`,
    `eval_beta_16` and so on; it is also written to `out/train_log.jsonl`. Raises `UserError` for data of another
    target, a folder of another run, damaged checkpoints, checkpoints that `resume=False` would overwrite, and forward
    passes that the processes cannot share evenly.
    """
    _check_data(target, drafter, dataset, held_out)
    if settings.loss == "teacher":
        _check_teacher(target, dataset)
    held_out = held_out if held_out is not None and len(held_out) else None
    if held_out is not None:
        draft_positions(held_out, drafter, settings.eval_positions, len(held_out), settings.seed)
    processes = join_processes(target.device.type)
    with processes.main_process_first(), disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        known, manifest = read_manifest(out / RUN_FILE), _manifest(target, drafter, dataset, settings)
        checkpoint, torn = latest_checkpoint(out / "checkpoints"), unsealed(out / "checkpoints")
        ours = known is not None and known.keys() >= manifest.keys() & OF_A_RUN
        if known is None and (torn or checkpoint is not None):
            raise UserError(f"{out} holds checkpoints of something else; give --out a new folder")
        if processes.is_main_process and ours and checkpoint is None and not (out / "model.safetensors").exists():
            (out / RUN_FILE).unlink(missing_ok=True)  # left by a run that wrote no checkpoint: its settings may change
        # Settings that are newer than a folder had the value then that is their default now.
        older = {"settings": TrainSettings.parse({}).learnt_from(), "start": "", "weights": None, "dtype": None}
        claim(out / RUN_FILE, manifest | {"start": start}, older, FREE)
        if processes.is_main_process:  # now that the folder is this run's
            remove_unsealed(out / "checkpoints")
    if checkpoint is not None and not resume:
        raise UserError(f"{out} holds checkpoints; resume them, or use another output folder")

    state = trainer_state(checkpoint) if checkpoint else None
    if checkpoint and state and state["global_step"] >= state["max_steps"]:
        drafter.load_state_dict(load_file(checkpoint / "model.safetensors"))
    else:
        with frozen(target.model), disk_errors(out):
            if settings.features == "cached":
                dataset = _with_features(target, drafter, dataset, out / "features", settings, shard_target)
            if shard_target:
                shard_layers(target.model)
            trainer = DrafterTrainer(target, drafter, dataset, held_out, out / "checkpoints", settings)
            with trainer.due.signals(), tensors_alone(checkpoint), trainer.shown:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.due.asked is not None and trainer.state.global_step < trainer.state.max_steps:
            raise Stopped(trainer.due.asked)
        state = {"global_step": trainer.state.global_step, "log_history": trainer.state.log_history}
    # The Trainer's last entry sums up this call, not the run.
    history = [entry for entry in state["log_history"] if "train_runtime" not in entry]
    drafter.eval()
    if held_out is not None:
        fit_temperature(target, drafter, held_out, batch_size=settings.eval_batch_size, seed=settings.seed)
    if processes.is_main_process:
        with disk_errors(out):
            drafter.save_pretrained(out)
            write_atomic(out / LOG_FILE, map(json.dumps, history))
    processes.wait_for_everyone()
    return Trained(state["global_step"], history)


class DrafterTrainer(Trainer):
    """A `Trainer` whose model is the drafter alone: the target is neither optimised nor saved.

    Row order and anchors come from generators seeded by (seed, epoch or step, row), so that resuming,
    gradient accumulation and the number of processes change no draw.
    """

    def __init__(
        self,
        target: Target,
        drafter: TrainableDrafter,
        dataset: DistilledDataset,
        held_out: DistilledDataset | None,
        checkpoints: Path,
        settings: TrainSettings,
    ):
        self.target, self.settings = target, settings
        self.due = DueCheckpoints()
        drafter.check_loss(settings.loss)
        super().__init__(
            model=drafter,
            args=training_arguments(settings, checkpoints, target.device, evaluate=held_out is not None),
            train_dataset=dataset,
            eval_dataset=held_out,
            data_collator=collate,
            callbacks=[self.due, LogBeforeSave()],
        )
        self.shown = TrainingProgress()
        for printing in (ProgressCallback, PrinterCallback):
            self.remove_callback(printing)
        if settings.progress:
            self.add_callback(self.shown)
        # The Trainer writes this into every model's config, where ours refuses unknown keys.
        if hasattr(drafter.config, "use_cache"):
            del drafter.config.use_cache
        # The loss is divided by the anchors of the whole step, see `get_batch_samples`.
        self.model_accepts_loss_kwargs = True
        self.begun, self.tokens = time.perf_counter(), 0
        self.before: dict[str, float] | None = None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds `seconds` and `tokens`, text that was read, of the whole run; a resumed one goes on counting."""
        if self.before is None:
            self.before = next((entry for entry in reversed(self.state.log_history) if "tokens" in entry), {})
        seconds = self.before.get("seconds", 0.0) + time.perf_counter() - self.begun
        spent = {"seconds": round(seconds, 1), "tokens": int(self.before.get("tokens", 0)) + self.tokens}
        super().log(logs | spent, *args, **kwargs)

    def create_optimizer(self, model: Any = None) -> Optimizer:
        if getattr(self, "optimizer", None) is None and self.settings.optimizer == "muon":
            config = self.model.config
            vocabularies = (config.vocab_size, getattr(config, "draft_vocab_size", 0))
            decayed = self.get_decay_parameter_names(self.model)
            self.optimizer = muon_and_adamw(self.model, vocabularies, decayed, self.settings)
        return super().create_optimizer(model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(row.ids) for row in dataset.rows]
        return LengthSampler(
            lengths, self.args.train_batch_size, self.settings.seed, processes=self.accelerator.num_processes
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """The micro batches of a step and the anchors in all of them, on all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        text = sum(int(b["lengths"][b["lengths"] > b["answer_start"]].sum()) for b in batches)
        count = sum(int(anchor_counts(b["lengths"], b["answer_start"], self.settings.anchors).sum()) for b in batches)
        everywhere = self.accelerator.gather(torch.tensor([[text, count]], device=device)).sum(0)
        self.tokens += int(everywhere[0])
        return batches, everywhere[1]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Mean loss of the batch's anchors; in training, its share of the step's mean."""
        total, count = self.anchor_losses(model, inputs)
        if num_items_in_batch is None:
            loss = total / count
        else:  # gradients are averaged over the processes
            loss = total / num_items_in_batch * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def anchor_losses(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        """Sum of the losses at a batch's anchors, and how many they are."""
        settings, config = self.settings, self.accelerator.unwrap_model(model).config
        tokens, lengths = inputs["input_ids"], inputs["lengths"]
        moment = f"{settings.seed}:{self.state.global_step if model.training else 'eval'}"
        positions, used = draw_anchors(lengths, inputs["answer_start"], inputs["key"], settings.anchors, seed=moment)
        anchors = label_anchors(tokens, lengths, positions, used, config.draft_length)
        if "features" in inputs:
            features, last = inputs["features"], inputs.get("last")
        else:
            features, last = self.target.hidden_states(tokens, config.target_layer_ids)

        copies = anchor_copies(config, tokens, positions, settings.copy_dropout if model.training else 0.0)
        last = last if settings.loss == "teacher" else None
        batch = AnchorBatch(features, tokens, anchors, loss_options(settings), last, copies)
        # A call of the module itself: wrappers that gather gradients (DDP) must see it.
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=settings.bf16):
            return model(batch, self.target.embed, self.target.head), int(used.sum())

    @torch.no_grad()
    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The held-out loss, and β by tree size. Processes share the losses; each finds β by itself.

        All make the same number of forward passes: a sharded target's weights are gathered in each.
        """
        prefix = kwargs.get("metric_key_prefix", "eval")
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        rows, size = self.eval_dataset, self.settings.eval_batch_size
        mine = size * self.accelerator.process_index
        for start in range(0, len(rows), size * self.accelerator.num_processes):
            chosen = range(start + mine, min(start + mine + size, len(rows)))
            batch = collate([rows[index] for index in chosen or [EMPTY_ROW]])
            loss, count = self.anchor_losses(model, self._prepare_inputs(batch))
            total += torch.tensor([float(loss), count], device=total.device)
        loss, count = self.accelerator.gather(total[None]).sum(0).tolist()
        beta = offline_beta(
            self.target,
            model,
            rows,
            nodes=self.settings.eval_nodes,
            max_positions=self.settings.eval_positions,
            max_rows=len(rows),
            batch_size=size,
            seed=self.settings.seed,
        )
        metrics = {f"{prefix}_loss": loss / count}
        metrics |= {f"{prefix}_{name}": round(value, 4) for name, value in beta.items()}
        return EvalLoopOutput(predictions=(), label_ids=None, metrics=metrics, num_samples=len(rows))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process has a file of its own there
        if self.args.should_save:
            seal(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")


class LogBeforeSave(TrainerCallback):
    """Logs at every checkpoint: the Trainer's running sum of losses is not saved with it."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_log = control.should_log or control.should_save
        return control


def training_arguments(
    settings: TrainSettings, checkpoints: Path, device: torch.device, evaluate: bool
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=settings.steps or -1,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.eval_batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": settings.min_learning_rate},
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.max_grad_norm,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=settings.eval_every,
        save_steps=settings.save_every,
        save_total_limit=settings.keep_checkpoints,
        report_to=list(settings.report_to),
        disable_tqdm=not settings.progress,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=True,  # a process may have rows without anchors at the end of an epoch
        use_cpu=device.type == "cpu",
        seed=settings.seed,
    )
    arguments.gradient_accumulation_steps = share_of(settings.accumulate, arguments.world_size)
    return arguments


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Context manager: no parameter of the model requires a gradient."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _with_features(
    target: Target,
    drafter: TrainableDrafter,
    dataset: DistilledDataset,
    folder: Path,
    settings: TrainSettings,
    shard_target: bool,
) -> DistilledDataset:
    """The rows with features from files, which are written first; processes share the work and the folder."""
    if shard_target:
        raise UserError("a sharded target computes its features as they are needed; leave out --features cached")
    files = FeatureFiles(folder, target, dataset, drafter.feature_layers, last=settings.loss == "teacher")
    processes = join_processes(target.device.type)
    with processes.main_process_first():
        files.open_folder(settings.features_limit)
    files.fill(settings.batch_size, (processes.process_index, processes.num_processes), settings.progress)
    processes.wait_for_everyone()
    return WithFeatures(files)


def _check_data(
    target: Target, drafter: TrainableDrafter, dataset: DistilledDataset, held_out: DistilledDataset | None
) -> None:
    drafter.check_target(target.model.config)
    target.check_drafter(drafter)
    if not len(dataset):
        raise UserError("there are no training rows; distill more, or hold out fewer")
    check_writer(dataset.manifest or {}, target.model)
    for rows in (dataset, held_out) if held_out is not None else (dataset,):
        rows.check_vocabulary(target.vocab_size)


def _check_teacher(target: Target, dataset: DistilledDataset) -> None:
    """Its logits must be what its LM head makes of its last states: some families scale or cap them afterwards."""
    tokens = dataset[0]["input_ids"][None, :8].to(target.device)
    with torch.no_grad():
        expected, last = target.model(tokens).logits.float(), target.hidden_states(tokens, [0])[1]
        found = target.head(last).float()
    if not torch.allclose(found, expected, atol=0.01 * float(expected.std()), rtol=0.0):
        raise UserError("this target changes its logits behind the LM head; train with --loss prefix")


def _manifest(
    target: Target, drafter: TrainableDrafter, dataset: DistilledDataset, settings: TrainSettings
) -> dict[str, Any]:
    rows = digest(" ".join(f"{row.key}:{len(row.ids)}" for row in dataset.rows))
    return {
        "target": config_hash(target.model.config),
        "weights": weights_hash(target.model),
        "dtype": str(target.dtype).removeprefix("torch."),
        "drafter": config_hash(drafter.config),
        "rows": {"count": len(dataset), "hash": rows},
        "settings": settings.learnt_from(),
        "versions": versions(),
    }
