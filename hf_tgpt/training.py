"""The training loop, with Accelerate."""

from __future__ import annotations

import functools
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .checkpoint import (
    adapter_checkpoints,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_weights,
    trained_weights,
)
from .data import Collator, FewShotImages
from .evaluation import evaluate, silent
from .interruption import EXIT_CODES, Interruption, interruptions
from .parallel import check_engine, of_the_whole_batch, split
from .references import Reference, clip_of
from .towers import dimensions
from .training_config import TrainingConfig, make_optimizer, rate

if TYPE_CHECKING:
    from .features import CachedImages


@dataclass
class Progress:
    """What a resumed run has to know of the past; Accelerate saves it with each checkpoint."""

    step: int = 0
    skipped: int = 0  # in a row, up to here
    best_accuracy: float = -1.0
    best_step: int = 0
    # Of the epoch that is under way, over all processes: losses, parts, hits and images.
    so_far: list[float] = field(default_factory=lambda: [0.0] * 4)
    history: list[dict[str, float]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def train(
    model: PeftModel | Reference,
    images: FewShotImages | CachedImages,
    config: TrainingConfig,
    accelerator: Accelerator,
    output_dir: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    validation: DataLoader | None = None,
    resume: bool = False,
) -> list[dict[str, float]]:
    """Trains the active adapter of a PeftModel in place and returns the history, one row an epoch.

    `model` may be any module that answers model(pixel_values, labels) with a loss and logits and has `class_names` and
    `uses_captions`. With a `validation` loader (prepared by the accelerator) the weights end up at the epoch of the
    best accuracy, otherwise at the last. `tokenizer` is needed where the method reads captions. Checkpoints go to
    `output_dir/checkpoint-STEP`; with `resume` the run goes on from the newest exactly as if it had never stopped.

    A model that has nothing to train (zero-shot) stays as it is and has no history.

    Raises ValueError before the first step if labels, class names, batch size, checkpoint or Accelerate's engine (FSDP)
    do not fit, FloatingPointError for a loss or gradient that is not finite, OSError if a checkpoint cannot be written.
    SIGTERM and Ctrl-C end the program (SystemExit, 128 + the signal's number) after a checkpoint where they found it.
    """
    check_engine(accelerator, config.gradient_accumulation_steps)
    accelerator.gradient_accumulation_steps = 1  # train_epoch itself computes a batch in parts
    check_labels(images.dataset, model.class_names)
    if getattr(model, "learns_nothing", False):
        return []
    if not trained_weights(model):
        raise ValueError("`model` has no weights to train; load an adapter with is_trainable=True to go on with it.")
    best = Path(output_dir) / "best_adapter.safetensors"
    sampler = EpochSampler(len(images), config.seed)
    collate = Collator()
    if model.uses_captions and "caption" in images.dataset.column_names:
        if tokenizer is None:
            raise ValueError("`tokenizer`=None but this method reads the images' captions; pass CLIP's tokenizer.")
        collate = Collator(tokenizer, dimensions(clip_of(model))["context_length"])
    loader = train_loader(images, sampler, config, accelerator, collate)
    steps_per_epoch = len(loader) // accelerator.num_processes
    steps = config.max_steps or config.epochs * steps_per_epoch
    optimizer = make_optimizer(model, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps, steps_per_epoch, config))
    accelerator.free_memory()  # of an earlier training with this accelerator
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    progress = Progress()

    def not_finite(epoch: int) -> None:
        """Tells where it is, and stops there if that is what was chosen or what becomes of skipping."""
        sampler.set_epoch(epoch)
        size = loader.total_batch_size
        first = (progress.step - epoch * steps_per_epoch) * size
        where = (
            f"The loss or its gradient is not finite at step {progress.step} (learning rate "
            f"{schedule.get_last_lr()[0]:.2g}, training images {list(sampler)[first : first + size]})"
        )
        if config.non_finite == "stop" or progress.skipped + 1 >= steps_per_epoch:
            raise FloatingPointError(f"{where}; lower `learning_rate` or set `max_grad_norm`.")
        accelerator.print(f"{where}; the step is skipped.")

    # The schedule is not prepared: Accelerate would step it once for each process.
    states = adapter_checkpoints(accelerator, model, progress=progress, schedule=schedule)
    with states, interruptions() as interruption:
        if resume:
            load_checkpoint(accelerator, output_dir)
        bar = tqdm(total=steps, initial=progress.step, desc="training", disable=silent(accelerator))
        while progress.step < steps:
            epoch, done = divmod(progress.step, steps_per_epoch)
            batches = accelerator.skip_first_batches(loader, done)
            batches.set_epoch(epoch)  # Accelerate's loader tells its own count to the sampler; a new one starts at 0
            sampler.set_epoch(epoch)  # and with several processes it does not reach it
            images.set_epoch(epoch)
            last_step = min(steps, (epoch + 1) * steps_per_epoch)
            hooks = functools.partial(not_finite, epoch), interruption
            row = train_epoch(
                wrapped, batches, last_step, optimizer, schedule, config, accelerator, progress, bar, *hooks
            )
            last, epoch = progress.step >= steps, epoch + 1
            if row is None:  # interrupted
                break
            if validation is not None and (last or epoch % config.evaluate_every == 0):
                model.eval()
                accuracy = evaluate(wrapped, validation, accelerator, "validating")["accuracy"]
                row["validation_accuracy"] = accuracy
                bar.set_postfix(loss=f"{row['loss']:.3f}", validation=f"{accuracy:.3f}")
                if accuracy > progress.best_accuracy:
                    progress.best_accuracy, progress.best_step = accuracy, progress.step
                    save_weights(accelerator, model, best)
            progress.history.append(row)
            accelerator.log({name: value for name, value in row.items() if name != "step"}, step=progress.step)
            if config.save_every and (last or epoch % config.save_every == 0):
                save_checkpoint(accelerator, output_dir, progress.step, config.keep_checkpoints)
            if not last and interruption.asked(accelerator):
                break
        bar.close()
        if progress.step < steps:
            save_checkpoint(accelerator, output_dir, progress.step, config.keep_checkpoints)
            number = interruption.asked(accelerator)
            accelerator.print(
                f"Stopped by {signal.Signals(number).name} at step {progress.step} of {steps}, which is saved in "
                f"{output_dir}; go on with --resume."
            )
            raise SystemExit(EXIT_CODES[number])

    accelerator.wait_for_everyone()
    if validation is not None:
        load_weights(model, best)
    # Mixed precision wraps the forward; the model leaves as it came.
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False).eval()
    return progress.history


def train_epoch(
    model: nn.Module,
    batches: Iterable[dict[str, torch.Tensor]],
    last_step: int,
    optimizer: AcceleratedOptimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    config: TrainingConfig,
    accelerator: Accelerator,
    progress: Progress,
    bar: tqdm,
    not_finite: Callable[[], None],
    interruption: Interruption,
) -> dict[str, float] | None:
    """Trains up to `last_step` and returns the epoch's row of the history; None if it was interrupted before.

    `not_finite()` is called in place of a step whose loss or gradient is not finite; it may raise.
    """
    model.train()
    # Losses, parts, hits and images of this process, and on the main one of all before an interruption.
    seen = torch.tensor(progress.so_far if accelerator.is_main_process else [0.0] * 4, device=accelerator.device)
    interrupted = False
    for batch in batches:
        if interrupted or progress.step >= last_step:
            continue  # the loader is read to its end, as Accelerate needs
        finite, parts = True, split(batch, config.gradient_accumulation_steps)
        whole = of_the_whole_batch(model, batch, len(parts), accelerator)
        for number, part in enumerate(parts, 1):
            with accelerator.no_sync(model) if number < len(parts) else nullcontext():
                output = model(**part, **whole)
                accelerator.backward(output.loss / len(parts))
            loss, hits = output.loss.item(), int((output.logits.argmax(-1) == part["labels"]).sum())
            finite &= math.isfinite(loss)
            if finite:
                seen += torch.tensor([loss, 1, hits, len(part["labels"])], device=accelerator.device)
        finite = all_finite(finite, model, optimizer, accelerator)
        if not finite:
            optimizer.zero_grad()  # nothing is left to step with
        elif config.max_grad_norm is not None:
            accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        if finite or optimizer.scaler is None:
            optimizer.step()
        optimizer.zero_grad()
        if not finite:
            not_finite()
        progress.skipped = 0 if finite else progress.skipped + 1
        schedule.step()
        progress.step += 1
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{float(seen[2] / seen[3]):.3f}", refresh=False)
        interrupted = bool(interruption.asked(accelerator))
    totals = accelerator.reduce(seen).tolist()
    if interrupted and progress.step < last_step:
        progress.so_far = totals
        return None
    progress.so_far = [0.0] * 4
    return {
        "step": progress.step,
        "loss": totals[0] / max(1, totals[1]),
        "train_accuracy": totals[2] / max(1, totals[3]),
        "learning_rate": schedule.get_last_lr()[0],
    }


def all_finite(finite: bool, model: nn.Module, optimizer: AcceleratedOptimizer, accelerator: Accelerator) -> bool:
    """Whether a step may be taken: `finite` in all processes, and its gradient too."""
    if optimizer.scaler is None:  # fp16's scaler looks for itself and skips such steps, as it is meant to
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        finite &= bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients)))
    if accelerator.num_processes == 1:
        return finite
    return bool(accelerator.gather(torch.tensor([finite], device=accelerator.device)).all())


# Data ----------------------------------------------------------------------------------------------------------------


class EpochSampler(Sampler):
    """A permutation of the images that depends on seed and epoch alone, so that a resumed epoch is the same epoch."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.length, generator=generator).tolist())


def train_loader(
    images: FewShotImages | CachedImages,
    sampler: EpochSampler,
    config: TrainingConfig,
    accelerator: Accelerator,
    collate: Collator,
) -> DataLoader:
    """A batch is a process's images of a step; those of all processes do not depend on the number of processes."""
    parts = accelerator.num_processes * config.gradient_accumulation_steps
    # As in the releases, an incomplete last batch is dropped, unless it is the only one.
    batch_size = min(config.batch_size, len(images) // parts * parts)
    if batch_size % parts or batch_size == 0:
        raise ValueError(
            f"`batch_size`={config.batch_size} with {len(images)} images cannot be shared by "
            f"{accelerator.num_processes} processes x {config.gradient_accumulation_steps} accumulated parts; choose a "
            f"multiple of {parts} and at least as many images."
        )
    return DataLoader(
        images,
        batch_size=batch_size // accelerator.num_processes,
        sampler=sampler,
        collate_fn=collate,
        num_workers=config.num_workers,
        drop_last=True,
        pin_memory=torch.cuda.is_available(),
    )


def check_labels(dataset: Dataset, class_names: list[str]) -> None:
    """Raises ValueError unless the data set's labels are the adapter's classes."""
    names = dataset.features["label"].names
    if names != class_names:
        first = next((i for i, pair in enumerate(zip(names, class_names, strict=False)) if pair[0] != pair[1]), None)
        detail = f"label {first} is {names[first]!r} there" if first is not None else f"{len(names)} classes there"
        raise ValueError(
            f"`class_names` ({len(class_names)} classes) are not the data set's: {detail}. Use the data set's names in "
            "their order, hf_tgpt.data.class_names(dataset)."
        )
