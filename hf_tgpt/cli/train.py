"""Trains a few-shot adapter on a CLIP, compares it with zero-shot, saves it, reloads it and checks it.

Without --method, your own pictures get GDA, which is fitted in one pass over them. Without any option: TGP-T with 16
images per class on the package's toy world, with the toy CLIP of the package. On several GPUs or machines:
accelerate launch -m hf_tgpt train ...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, broadcast_object_list, set_seed

from ..adapters.class_features import save_class_features
from ..adapters.folder import digest_of_weights
from ..data import (
    FewShotImages,
    ImageTransform,
    attach_captions,
    choose_classes,
    class_names,
    load_splits,
    sample_few_shot,
    without_damaged,
)
from ..data.fewshot import remark_on_sizes
from ..data.sources import LARGEST_CHECK
from ..encoders import encoder_of
from ..encoders.loading import check_picture_size, load_clip, load_image_processor
from ..encoders.precision import read_dtype
from ..evaluation.accuracy import evaluate, evaluation_loader, measure, predict
from ..evaluation.calibration import calibrate, settings_of
from ..evaluation.plots import PLOTS_REMEDY, can_plot
from ..hub.loading import load_trained
from ..hub.push import check_repository, push_folder
from ..inference.classifier import Classifier
from ..methods import config_class
from ..methods.zero_shot import zero_shot_beside
from ..texts.sentences import load_tokenizer
from ..training.batches import check_engine
from ..training.checkpoint import Clock, trained_weights
from ..training.features import CachedImages, cache_features, check_can_be_cached
from ..training.loop import train
from ..training.recipes import DEFAULT_METHOD
from ..training.results import judge, summarise, write_run
from ..training.run_folder import check_output_dir, prepare_output_dir, write_seen_pictures
from ..utils.names import TOY_CLIP
from .arguments import parse_arguments
from .output import accuracies, list_remarks, tidy_output
from .report import REPORT, Tested, write_report
from .words import in_options

EXAMPLES = """
hf-tgpt train
hf-tgpt train --dataset pictures --output_dir runs/mine
hf-tgpt train --dataset pictures --method maple --model openai/clip-vit-base-patch16
"""
BY_DEFAULT = (
    f"--method is not given, so it is {DEFAULT_METHOD}: of the methods that need no GPU, the most accurate one on real "
    "pictures (README). `hf-tgpt compare` tries all of them on yours."
)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Runs the training; `argv` defaults to that of the process."""
    # 1. Arguments: --help shows them with the fields of the method's config and of the training.
    args = parse_arguments(argv, prog, __doc__, EXAMPLES)
    config, run = args.training, args.run

    # 2. Processes, and an empty output folder.
    tidy_output()
    if run.log_with and run.log_with not in {str(tracker) for tracker in get_available_trackers()}:
        known = sorted({str(kind) for kind in LoggerType} - {"all"})
        remedy = f"install it (pip install {run.log_with.replace('_', '-')})"
        remedy = remedy if run.log_with in known else f"choose one of {', '.join(known)}"
        raise ValueError(f"`log_with`={run.log_with!r} is not an installed tracker; {remedy} or leave it out.")
    output_dir = run.output_dir or Path("runs") / f"{args.method}-{datetime.now():%Y%m%d-%H%M%S}"
    check_output_dir(output_dir, run.resume)
    accelerator = Accelerator(mixed_precision=run.mixed_precision, log_with=run.log_with, project_dir=output_dir)
    check_engine(accelerator, config.gradient_accumulation_steps)
    say = (lambda text: None) if run.json else accelerator.print
    clock = Clock()

    # 3. The images, all checked before anything is written: k per class for training, min(4, k) for validation, the
    # whole test split.
    with list_remarks(run.strict, silent=not accelerator.is_main_process), accelerator.main_process_first():
        read = load_splits(**args.data.source, seed=config.seed, skip_damaged=True)
        splits = choose_classes(read, args.data.classes)
        remark_on_sizes(splits, run.shots)
        chosen = {
            split: sample_few_shot(splits[split], k, config.seed, allow_fewer=run.allow_fewer or split != "train")
            for split, k in {"train": run.shots, "validation": min(4, run.shots)}.items()
            if split in splits
        } | {"test": splits["test"]}
        captions = "descriptions" if "caption" in chosen["train"].column_names else "template"
        if run.descriptions:
            chosen["train"], captions = attach_captions(chosen["train"], run.descriptions, seed=config.seed)
        if sum(read.num_rows.values()) > LARGEST_CHECK:
            chosen = {split: without_damaged(data, f"{split} images") for split, data in chosen.items()}
    names = class_names(chosen["train"])

    # 4. The base model with its tokenizer and image processor.
    set_seed(config.seed)
    model_name = args.data.model or str(TOY_CLIP)
    (dtype,) = broadcast_object_list([read_dtype(run.dtype, accelerator.device)])  # "auto" is measured
    clip = load_clip(model_name, dtype=dtype).to(accelerator.device).eval()
    tokenizer = load_tokenizer(encoder_of(clip), args.method_config.get("tokenizer_name_or_path"))
    processor = load_image_processor(model_name)
    if run.push_to_hub and accelerator.is_main_process:  # before training, so that a wrong token loses no work
        check_repository(run.push_to_hub, private=run.private or None)
    as_is = ImageTransform.from_processor(processor, train=False)
    check_picture_size(clip, as_is.size)
    augmented = ImageTransform.from_processor(processor, train=True, crop_scale=config.crop_scale)
    images = FewShotImages(chosen["train"], augmented, seed=config.seed)
    tested = FewShotImages(chosen["test"], as_is)
    held_out = FewShotImages(chosen["validation"], as_is) if "validation" in chosen else None

    # 5. Zero-shot CLIP as the baseline, and the method; the folder is made after all checks.
    say(f"{args.method} on {args.data.dataset} by {args.recipe or 'the defaults'} -> {output_dir}")
    if args.method_by_default and args.method == DEFAULT_METHOD:
        say(f"Note: {BY_DEFAULT}")
    templates = args.data.zero_shot_templates(names, args.method_config.get("templates"))
    plain = zero_shot_beside(clip, names, **templates)
    kind = config_class(args.method)
    model = kind(class_names=names, **(args.method_config | (templates if kind.follows_data else {}))).build(clip)
    if any(weight.dtype != torch.float32 for weight in trained_weights(model).values()):
        raise ValueError(
            f"`dtype`={run.dtype!r}: {args.method} trains weights of the base model itself, which need float32; choose "
            "`mixed_precision` instead."
        )
    if run.cache_features is not None:
        check_can_be_cached(model)
    output_dir = prepare_output_dir(output_dir, args.settings, run.resume, accelerator)
    if run.log_with:
        accelerator.init_trackers("hf-tgpt", {name: str(value) for name, value in args.settings.items()})
    if accelerator.is_main_process:
        write_seen_pictures(output_dir, chosen | {"test": read["test"]})  # for all classes

    # 6. Stored features if chosen; of test pictures too, if zero-shot uses the same features.
    train_images: FewShotImages | CachedImages = images
    test_images: FewShotImages | CachedImages = tested
    validation_images: FewShotImages | CachedImages | None = held_out
    if run.cache_features is not None:
        store = partial(
            cache_features, model, folder=run.cache_dir or output_dir / "features", num_workers=config.num_workers
        )
        with accelerator.main_process_first():
            train_images = store(images, run.cache_features)
            if model.learner.states_are == plain.learner.states_are:
                test_images = store(tested, 1, dtype=torch.float32)
                validation_images = held_out and store(held_out, 1, dtype=torch.float32)
    stored = (images for images in (train_images, test_images, validation_images) if isinstance(images, CachedImages))
    saved = sum(images.seconds_saved for images in stored)
    test = evaluation_loader(test_images, accelerator, config.num_workers)
    validation = None
    if validation_images is not None:
        validation = evaluation_loader(validation_images, accelerator, config.num_workers)
    zero_shot = evaluate(plain, test, accelerator, "zero-shot")
    history = train(model, train_images, config, accelerator, output_dir, tokenizer, validation, run.resume, clock)
    predictions = predict(model.eval(), test, accelerator, "testing")
    adapted = measure(predictions)
    held = None if validation is None else predict(model, validation, accelerator, "calibrating")

    # 7. Saved, reloaded into a fresh CLIP and checked, with another seed, so that equal random weights prove nothing.
    if accelerator.is_main_process:
        model.save_pretrained(output_dir)
        set_seed((config.seed + 1) % 2**32)
        fresh = load_clip(model_name, dtype=dtype).to(accelerator.device)
        fresh = load_trained(fresh, output_dir)
        some = [tested[i]["pixel_values"] for i in range(min(8, len(tested)))]
        batch = torch.stack(some).to(accelerator.device)
        with torch.no_grad(), accelerator.autocast():
            if not torch.equal(fresh(batch).logits.float(), model(batch).logits.float()):
                raise RuntimeError(f"What was saved in {output_dir} does not give the trained model's logits.")
        save_class_features(model, output_dir)

    # 8. results.json, a plot, the log and, saved again, the model card with the results; the calibration; the report.
    about: dict[str, Any] = {"method": args.method, "model": args.data.model, "dataset": args.data.dataset}
    about |= {"classes": args.data.classes, "shots": run.shots, "training_images": len(images)}
    about["dtype"] = str(dtype).removeprefix("torch.")
    remarks = judge(zero_shot["accuracy"], adapted, predictions["logits"].argmax(-1), history, names)
    fitted = model.learner.config.fitted or {}
    remarks += [fitted["note"]] if "note" in fitted else []
    results = summarise(about, config, model, zero_shot, adapted, captions, remarks, clock.seconds, saved)
    if accelerator.is_main_process:
        calibration = None
        if held is not None:
            logits, labels = torch.from_numpy(held["logits"]), torch.from_numpy(held["labels"])
            settings, weights = settings_of(model.learner.config), digest_of_weights(output_dir)
            what = f"{len(labels)} validation pictures"
            calibration = calibrate(logits, labels, names, pictures=what, settings=settings, weights=weights)
        write_run(output_dir, model, history, zero_shot, adapted, results, calibration)
        if run.report:
            tested_as = Tested(
                title=f"{args.method} on {args.data.dataset}",
                results=results,
                zero_shot=zero_shot,
                logits=predictions["logits"],
                labels=predictions["labels"],
                class_names=names,
                pictures=chosen["test"],
                classifier=Classifier(model, as_is),
                calibration=calibration,
                command=["train", *(sys.argv[1:] if argv is None else argv)],
                settings=args.settings | results["versions"],
                history=history,
            )
            write_report(output_dir, tested_as)
        if not can_plot():
            say(f"training.png is missing, since it needs matplotlib: {PLOTS_REMEDY}.")
    say(accuracies(results))
    for remark in remarks:
        say(f"Note: {in_options(remark)}")
    say(f"Reloaded from disk, it gives the same logits. {results['seconds']:.0f} s; everything is in {output_dir}")
    if run.report:
        say(f"What it gets wrong: {output_dir / REPORT}")
    if run.push_to_hub and accelerator.is_main_process:
        results["published"] = str(push_folder(output_dir, run.push_to_hub, private=run.private or None))
        say(f"Published: {results['published']}")
    if run.json:
        accelerator.print(json.dumps(results | {"output_dir": str(output_dir)}, indent=2, ensure_ascii=False))
    accelerator.end_training()
