"""Trains a few-shot adapter on a CLIP, compares it with zero-shot, saves it, reloads it and checks it.

    hf-tgpt train
    hf-tgpt train --method maple --model openai/clip-vit-base-patch16 --dataset path/to/pictures

On several GPUs or machines `accelerate launch -m hf_tgpt_cli train ...`. Without arguments: TGP-T with 16 images per
class on the package's toy world, with the toy CLIP that ships with it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import AutoTokenizer, CLIPImageProcessorPil

from .. import arguments, data
from ..encoders.identity import TOY_CLIP
from ..training.checkpoint import prepare_output_dir
from ..evaluation.accuracy import evaluate, evaluation_loader
from ..training.features import CachedImages, cache_features
from ..hub.push import check_repository, push_folder
from ..hub.loading import load_clip, load_trained, make_classifier
from ..encoders.shares import check_engine
from ..training.results import accuracies, summarise, tidy_output, write_run
from ..training.loop import train


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Trains as the command line says (None: that of the process)."""
    # 1. Arguments: --help shows them with the fields of the method's config and of the training.
    parser = argparse.ArgumentParser(
        prog,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    arguments.add_data_arguments(parser)
    arguments.add_run_arguments(parser)
    args = arguments.parse_arguments(parser, argv)
    config = args.training_config

    # 2. Processes, seed and folder.
    tidy_output()
    output_dir = args.output_dir or Path("runs") / f"{args.method}-{datetime.now():%Y%m%d-%H%M%S}"
    accelerator = Accelerator(mixed_precision=args.mixed_precision, log_with=args.log_with, project_dir=output_dir)
    check_engine(accelerator, config.gradient_accumulation_steps)
    output_dir = prepare_output_dir(output_dir, args.settings, args.resume, accelerator)
    say = (lambda text: None) if args.json else accelerator.print
    say(f"{args.method} on {args.dataset} by {args.config} -> {output_dir}")
    if args.log_with:
        accelerator.init_trackers("hf-tgpt", {name: str(value) for name, value in args.settings.items()})
        if accelerator.is_main_process and not accelerator.trackers:
            raise ValueError(
                f"`log_with`={args.log_with!r} is no tracker that is installed here; install it or leave it out."
            )
    if args.push_to_hub and accelerator.is_main_process:  # now, so that no work is lost for a wrong token
        check_repository(args.push_to_hub, private=args.private)
    set_seed(config.seed)
    start = time.perf_counter()

    # 3. The base model with its tokenizer and image processor.
    model_name = args.model or str(TOY_CLIP)
    clip = load_clip(model_name).to(accelerator.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.method_config.get("tokenizer_name_or_path") or model_name)
    processor = CLIPImageProcessorPil.from_pretrained(model_name)

    # 4. The images: k per class for training, min(4, k) for validation, the whole test split.
    with accelerator.main_process_first():
        splits = data.choose_classes(data.load_splits(**arguments.data_arguments(args), seed=config.seed), args.classes)
    names = data.class_names(splits["train"])
    few = data.sample_few_shot(splits["train"], args.shots, config.seed, allow_fewer=args.allow_fewer)
    captions = "descriptions" if "caption" in few.column_names else "template"
    if args.descriptions:
        few, captions = data.attach_captions(few, args.descriptions, seed=config.seed)
    images = data.FewShotImages(few, data.ImageTransform.from_processor(processor, train=True), seed=config.seed)
    images.check()
    as_is = data.ImageTransform.from_processor(processor, train=False)
    tested = data.FewShotImages(splits["test"], as_is)
    test = evaluation_loader(tested, accelerator, config.num_workers)
    validation = None
    if "validation" in splits:
        few = data.sample_few_shot(splits["validation"], min(4, args.shots), config.seed, allow_fewer=True)
        held_out = data.FewShotImages(few, as_is)
        held_out.check()
        validation = evaluation_loader(held_out, accelerator, config.num_workers)

    # 5. Zero-shot CLIP, to compare with.
    templates = arguments.zero_shot_templates(args, names, args.method_config.get("templates"))
    if args.method == "zero-shot":
        args.method_config |= templates
    zero_shot = evaluate(make_classifier("zero-shot", clip, names, **templates), test, accelerator, "zero-shot")

    # 6. The method, trained.
    model = make_classifier(args.method, clip, names, **args.method_config)
    seen: data.FewShotImages | CachedImages = images
    if args.cache_features is not None:
        with accelerator.main_process_first():
            folder = args.cache_dir or output_dir / "features"
            seen = cache_features(model, images, args.cache_features, folder, num_workers=config.num_workers)
    history = train(model, seen, config, accelerator, output_dir, tokenizer, validation, args.resume)
    adapted = evaluate(model.eval(), test, accelerator, "testing")

    # 7. Saved, reloaded into a fresh CLIP and checked; the seed is another one, so nothing agrees by a common start.
    if accelerator.is_main_process:
        model.save_pretrained(output_dir)
        set_seed(config.seed + 1)
        fresh = load_clip(model_name).to(accelerator.device)
        fresh = load_trained(fresh, output_dir)
        some = [tested[i]["pixel_values"] for i in range(min(8, len(tested)))]
        batch = torch.stack(some).to(accelerator.device)
        with torch.no_grad(), accelerator.autocast():
            if not torch.equal(fresh(batch).logits.float(), model(batch).logits.float()):
                raise RuntimeError(f"What was saved in {output_dir} does not give the trained model's logits.")

    # 8. results.json, a picture, the log and, saved again, the model card with the results.
    results = summarise(args, config, model, zero_shot, adapted, captions, seconds=time.perf_counter() - start)
    if accelerator.is_main_process:
        write_run(output_dir, model, history, zero_shot, adapted, results)
    say(accuracies(results))
    say(f"Reloaded from disk, it is equal. {results['seconds']:.0f} s; all of it is in {output_dir}")
    if args.push_to_hub and accelerator.is_main_process:
        results["published"] = str(push_folder(output_dir, args.push_to_hub, private=args.private))
        say(f"Published: {results['published']}")
    if args.json:
        accelerator.print(json.dumps(results | {"output_dir": str(output_dir)}, indent=2, ensure_ascii=False))
    accelerator.end_training()
