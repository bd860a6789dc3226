"""The training loop, with Accelerate."""

from __future__ import annotations

import logging
import math
import os
import signal
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..adapters.learner import PromptLearner, Stage
from ..adapters.tower_classifier import AdaptedModel
from ..data import Collator, FewShotImages
from ..encoders import encoder_of
from ..evaluation.accuracy import evaluate, silent
from .batches import EpochSampler, check_engine, check_labels, of_the_whole_batch, split, train_loader
from .checkpoint import (
    Clock,
    adapter_checkpoints,
    find_checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_weights,
    step_of,
    trained_weights,
)
from .config import TrainingConfig, make_optimizer, rate, steps_of, warmup_steps
from .features import CachedImages, encode_loader, encode_views
from .interruption import EXIT_CODES, Interruption, interruptions
from .stages import Span, plan

logger = logging.getLogger(__name__)
BEST = "best_adapter.safetensors"  # in the run's folder


@dataclass
class Progress:
    """The progress that a resumed run needs, stored in a checkpoint's states.json."""

    step: int = 0
    skipped: int = 0  # in a row, up to here
    best_accuracy: float = -1.0
    best_step: int = 0
    # For the current epoch, over all processes: losses, parts, hits and images.
    so_far: list[float] = field(default_factory=lambda: [0.0] * 4)
    history: list[dict[str, float]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


@dataclass
class Run:
    """The parts of one training run."""

    model: AdaptedModel
    learner: PromptLearner | None  # whose hooks are called
    weights: dict[str, torch.Tensor]  # all that any stage trains
    images: FewShotImages | CachedImages
    sampler: EpochSampler
    loader: DataLoader
    validation: DataLoader | None
    config: TrainingConfig
    accelerator: Accelerator
    output_dir: Path
    steps_per_epoch: int
    steps: int
    progress: Progress
    interruption: Interruption
    clock: Clock
    bar: tqdm

    @property
    def picks_best(self) -> bool:
        """Whether the final weights are those of the best epoch instead of the last."""
        return self.validation is not None and not (self.learner is not None and self.learner.last_epoch_is_result)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors that training changes, by name: the weights and the other state of the method."""
        state = {} if self.learner is None else self.learner.training_state()
        return self.weights | {f"training_state.{name}": value for name, value in state.items()}


def train(
    model: AdaptedModel,
    images: FewShotImages | CachedImages,
    config: TrainingConfig,
    accelerator: Accelerator,
    output_dir: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    validation: DataLoader | None = None,
    resume: bool = False,
    clock: Clock | None = None,
) -> list[dict[str, float]]:
    """Trains the active adapter of a PeftModel in place and returns the history, one row per epoch.

    `model` may be any module with `class_names` and `uses_captions` for which model(pixel_values, labels) returns a
    loss and logits; its `learner`, if it has one, provides the hooks. With a `validation` loader (prepared by the
    accelerator) the final weights are those of the epoch with the best accuracy (in the last stage, if a method has
    several), otherwise those of the last epoch. `tokenizer` is needed if the method reads captions. Checkpoints are in
    `output_dir/checkpoint-STEP`; with `resume` the run continues from the newest exactly as if it had never stopped,
    and `clock` then includes the seconds of its earlier parts.

    A method that is not trained by gradient descent is fitted instead, and returns the history of that, if any.

    Raises ValueError before the first step if labels, class names, batch size, stages, checkpoint or Accelerate's
    engine (FSDP) are unsuitable, FloatingPointError for a loss or gradient that is not finite, OSError if a checkpoint
    cannot be written. SIGTERM and Ctrl-C end the program (SystemExit, 128 + the signal's number) after saving a
    checkpoint.

    Example:
        >>> history = train(model, images, TrainingConfig(epochs=5), Accelerator(), "runs/mine")
    """
    check_engine(accelerator, config.gradient_accumulation_steps)
    accelerator.gradient_accumulation_steps = 1  # train_epoch itself computes a batch in parts
    check_labels(images.dataset, model.class_names)
    learner, weights = getattr(model, "learner", None), trained_weights(model)
    if not weights and (learner is None or learner.config.trains):
        raise ValueError("`model` has no weights to train; load an adapter with is_trainable=True to train it further.")
    if learner is not None and not learner.config.trains:
        return _fit(model, learner, images, validation, config, accelerator)
    sampler = EpochSampler(len(images), config.seed)
    collate = Collator()
    if model.uses_captions and "caption" in images.dataset.column_names:
        if tokenizer is None:
            raise ValueError("`tokenizer`=None but this method uses the images' captions; pass CLIP's tokenizer.")
        collate = Collator(tokenizer, encoder_of(model.get_base_model()).shape()["context_length"])
    loader = train_loader(images, sampler, config, accelerator, collate)
    steps_per_epoch = len(loader) // accelerator.num_processes
    steps = config.max_steps or config.epochs * steps_per_epoch
    spans = plan([Stage()] if learner is None else learner.stages(), steps, weights, config)

    checkpoint = find_checkpoint(output_dir) if resume else None
    done = 0 if checkpoint is None else step_of(checkpoint)
    with interruptions() as interruption:
        bar = tqdm(total=steps, initial=done, desc="training", disable=silent(accelerator))
        run = Run(
            model, learner, weights, images, sampler, loader, validation, config, accelerator, Path(output_dir),
            steps_per_epoch, steps, Progress(), interruption, clock or Clock(), bar,
        )  # fmt: skip
        if checkpoint is None:
            _fit(model, learner, images, validation, config, accelerator)
        # A run continues in the stage of its checkpoint.
        current = next((number for number, span in enumerate(spans) if span.first < done <= span.last), 0)
        try:
            for number in range(current, len(spans)):
                resumed = checkpoint is not None and number == current
                if not resumed:
                    run.progress.best_accuracy = -1.0  # the best of an earlier stage does not count for the last one
                    if learner is not None:
                        learner.begin_stage(encoder_of(model.get_base_model()), number)
                train_stage(run, spans[number], resumed)
        finally:
            for weight in weights.values():
                weight.requires_grad_(True)
        bar.close()

    if run.picks_best:
        load_weights(run.tensors(), run.output_dir / BEST)
    _choose_result(run)
    model.eval()
    return run.progress.history


def _fit(
    model: AdaptedModel,
    learner: PromptLearner | None,
    images: FewShotImages | CachedImages,
    validation: DataLoader | None,
    config: TrainingConfig,
    accelerator: Accelerator,
) -> list[dict[str, float]]:
    """Calls the method's `fit` hook, and copies the result of the first process to all."""
    if learner is None or type(learner).fit is PromptLearner.fit:
        return []
    held_out = None if validation is None else encode_loader(model, validation, accelerator)
    history = learner.fit(encoder_of(model.get_base_model()), encode_views(model, images), held_out, steps_of(config))
    with torch.no_grad():
        for tensor in learner.state_dict().values():
            tensor.copy_(broadcast(tensor.clone()))
    model.eval()
    return history


def train_stage(run: Run, span: Span, resumed: bool) -> None:
    """Trains a stage with its own weights, optimizer and schedule.

    Ends the program, after a checkpoint, if a signal requested it.
    """
    accelerator, progress, last = run.accelerator, run.progress, span.last
    steps = last - span.first
    warmup = warmup_steps(steps, run.steps_per_epoch, span.config)
    wanted = span.config.warmup_steps + span.config.warmup_epochs * run.steps_per_epoch
    if accelerator.is_main_process and warmup != wanted:
        logger.warning(
            f"The warm-up of {wanted} steps is cut to {warmup}, because there are only {steps} steps in all."
        )
    for name, weight in run.weights.items():
        weight.requires_grad_(name in span.trained)
    optimizer = make_optimizer(run.model.parameters(), span.config)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate(step, steps, run.steps_per_epoch, span.config)
    )
    accelerator.free_memory()  # of an earlier training or stage with this accelerator
    wrapped, optimizer, loader = accelerator.prepare(run.model, optimizer, run.loader)
    # The schedule is not prepared: Accelerate would step it once for each process.
    with adapter_checkpoints(accelerator, run.tensors(), progress=progress, schedule=schedule, clock=run.clock):
        if resumed:
            load_checkpoint(accelerator, run.output_dir)
        while progress.step < last:
            epoch, done = divmod(progress.step, run.steps_per_epoch)
            batches = accelerator.skip_first_batches(loader, done)
            batches.set_epoch(epoch)  # Accelerate's loader passes its own count to the sampler; a new one starts at 0
            run.sampler.set_epoch(epoch)  # and with several processes it does not reach it
            run.images.set_epoch(epoch)
            row = train_epoch(
                run, wrapped, batches, min(last, (epoch + 1) * run.steps_per_epoch), optimizer, schedule, span.config
            )
            if row is not None:
                _end_epoch(run, wrapped, epoch, row)
            if progress.step < run.steps and run.interruption.requested(accelerator):
                _stop(run)
    accelerator.wait_for_everyone()
    # Mixed precision wraps the forward; restore it.
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)


def _end_epoch(run: Run, wrapped: nn.Module, epoch: int, row: dict[str, float]) -> None:
    """After an epoch, or its part at the end of a stage: the hook, validation, history and a checkpoint."""
    accelerator, progress, config = run.accelerator, run.progress, run.config
    last = progress.step >= run.steps
    if run.learner is not None and (last or progress.step % run.steps_per_epoch == 0):
        run.learner.end_of_epoch(epoch, math.ceil(run.steps / run.steps_per_epoch))
    if run.validation is not None and (last or (epoch + 1) % config.evaluate_every == 0):
        run.model.eval()
        accuracy = evaluate(wrapped, run.validation, accelerator, "validating")["accuracy"]
        row["validation_accuracy"] = accuracy
        run.bar.set_postfix(loss=f"{row['loss']:.3f}", validation=f"{accuracy:.3f}")
        if run.picks_best and accuracy > progress.best_accuracy:
            progress.best_accuracy, progress.best_step = accuracy, progress.step
            save_weights(accelerator, run.tensors(), run.output_dir / BEST)
    progress.history.append(row)
    accelerator.log({name: value for name, value in row.items() if name != "step"}, step=progress.step)
    if config.save_every and (last or (epoch + 1) % config.save_every == 0):
        save_checkpoint(accelerator, run.output_dir, progress.step, config.keep_checkpoints)


def _choose_result(run: Run) -> None:
    """For a method with several results, ends with the first, or with the best on the validation pictures."""
    if run.learner is None or not (results := run.learner.results()):
        return
    weights, accuracies = dict(run.learner.named_parameters()), {}

    def take(name: str) -> None:
        with torch.no_grad():
            for weight, value in results[name].items():
                weights[weight].copy_(value)

    if run.validation is not None:
        run.model.eval()
        for name in results:
            take(name)
            accuracies[name] = evaluate(run.model, run.validation, run.accelerator, "validating")["accuracy"]
    chosen = max(results, key=lambda name: accuracies.get(name, 0.0))
    take(chosen)
    run.learner.ended_with(chosen, accuracies)


def _stop(run: Run) -> None:
    """Ends the program after a checkpoint, because of a signal."""
    run.bar.close()
    save_checkpoint(run.accelerator, run.output_dir, run.progress.step, run.config.keep_checkpoints)
    number = run.interruption.requested(run.accelerator)
    run.accelerator.print(
        f"Stopped by {signal.Signals(number).name} at step {run.progress.step} of {run.steps}, which is saved in "
        f"{run.output_dir}; continue with --resume."
    )
    raise SystemExit(EXIT_CODES[number])


def train_epoch(
    run: Run,
    model: nn.Module,
    batches: Iterable[dict[str, torch.Tensor]],
    last_step: int,
    optimizer: AcceleratedOptimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    config: TrainingConfig,
) -> dict[str, float] | None:
    """Trains up to `last_step` and returns the epoch's row of the history; None if it was interrupted before.

    `model` is the run's as Accelerate prepared it, `config` that of the stage.
    """
    accelerator, progress = run.accelerator, run.progress
    model.train()
    # Losses, parts, hits and images of this process, and on the main one of all before an interruption.
    totals = torch.tensor(progress.so_far if accelerator.is_main_process else [0.0] * 4, device=accelerator.device)
    interrupted = False
    for batch in batches:
        if interrupted or progress.step >= last_step:
            continue  # the loader is read to its end, as Accelerate needs
        finite, parts = True, split(batch, config.gradient_accumulation_steps)
        of_batch = of_the_whole_batch(model, batch, len(parts), accelerator)
        for number, part in enumerate(parts, 1):
            with accelerator.no_sync(model) if number < len(parts) else nullcontext():
                output = model(**part, **of_batch)
                accelerator.backward(output.loss / len(parts))
            loss, hits = output.loss.item(), int((output.logits.argmax(-1) == part["labels"]).sum())
            finite &= math.isfinite(loss)
            if finite:
                totals += torch.tensor([loss, 1, hits, len(part["labels"])], device=accelerator.device)
        finite = all_finite(finite, model, optimizer, accelerator)
        if not finite:
            optimizer.zero_grad()  # nothing is left to step with
        elif config.max_grad_norm is not None:
            accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        if finite or optimizer.scaler is None:
            optimizer.step()
        optimizer.zero_grad()
        if not finite:
            _not_finite(run, config, schedule)
        progress.skipped = 0 if finite else progress.skipped + 1
        schedule.step()
        progress.step += 1
        run.bar.update()
        run.bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{float(totals[2] / totals[3]):.3f}", refresh=False)
        interrupted = bool(run.interruption.requested(accelerator))
    sums = accelerator.reduce(totals).tolist()
    if interrupted and progress.step < last_step:
        progress.so_far = sums
        return None
    progress.so_far = [0.0] * 4
    return {
        "step": progress.step,
        "loss": sums[0] / max(1, sums[1]),
        "train_accuracy": sums[2] / max(1, sums[3]),
        "learning_rate": schedule.get_last_lr()[0],
    }


def _not_finite(run: Run, config: TrainingConfig, schedule: torch.optim.lr_scheduler.LRScheduler) -> None:
    """Reports a step that is not finite, and stops if that was chosen or if a whole epoch was skipped."""
    step = run.progress.step
    epoch, done = divmod(step, run.steps_per_epoch)
    run.sampler.set_epoch(epoch)
    size = run.loader.batch_size * run.accelerator.num_processes
    where = (
        f"The loss or its gradient is not finite at step {step} (learning rate {schedule.get_last_lr()[0]:.2g}, "
        f"training images {list(run.sampler)[done * size : (done + 1) * size]})"
    )
    if config.non_finite == "stop" or run.progress.skipped + 1 >= run.steps_per_epoch:
        raise FloatingPointError(f"{where}; lower `learning_rate` or set `max_grad_norm`.")
    run.accelerator.print(f"{where}; the step is skipped.")


def all_finite(finite: bool, model: nn.Module, optimizer: AcceleratedOptimizer, accelerator: Accelerator) -> bool:
    """Whether a step may be taken: `finite` in all processes, and its gradient too."""
    if optimizer.scaler is None:  # fp16's scaler checks this itself and skips such steps by design
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        finite &= bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients)))
    if accelerator.num_processes == 1:
        return finite
    return bool(accelerator.gather(torch.tensor([finite], device=accelerator.device)).all())
