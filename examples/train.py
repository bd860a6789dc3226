"""Trains a few-shot adapter on a CLIP, compares it with zero-shot, saves it, reloads it and checks it.

    accelerate launch examples/train.py
    accelerate launch examples/train.py --method maple --model openai/clip-vit-base-patch16 --dataset path/to/pictures

Without arguments: TGP-T with 16 images per class on the package's toy world, with the toy CLIP that ships with it.
"""

import argparse
import time
from datetime import datetime
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import get_peft_model
from transformers import AutoTokenizer, CLIPImageProcessorPil

import hf_tgpt
from hf_tgpt.arguments import parse_arguments
from hf_tgpt.card import write_card
from hf_tgpt.checkpoint import prepare_output_dir
from hf_tgpt.data import FewShotImages, ImageTransform, class_names, load_splits, sample_few_shot
from hf_tgpt.evaluation import evaluate, evaluation_loader, zero_shot_classifier
from hf_tgpt.report import plot_run, summarise, tidy_output, write_json
from hf_tgpt.training import train

# 1. Arguments: --help shows them with the fields of the method's config and of the training.
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False, allow_abbrev=False
)
parser.add_argument("--model", help="a CLIP: a Hub id or folder; a folder with only config files starts at random; the "
                    "recipe is METHOD.json (default: the package's toy CLIP, and toy_METHOD.json)")  # fmt: skip
parser.add_argument("--dataset", default="toyworld:codes", help="toyworld:TASK[/DOMAIN], a folder of pictures or a Hub "
                    "id (default: %(default)s)")  # fmt: skip
parser.add_argument("--shots", type=int, default=16, help="training images per class (default: %(default)s)")
parser.add_argument("--allow_fewer", action="store_true", help="accept classes with fewer images than shots")
for column in ("image", "label", "caption"):
    parser.add_argument(f"--{column}_column", help=f"the {column} column of a Hub dataset (default: found by its type)")
parser.add_argument("--output_dir", type=Path, help="a folder without a run in it (default: a new one in runs/)")
parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output_dir")
parser.add_argument("--mixed_precision", choices=["no", "bf16", "fp16"], help="(default: as accelerate is set up)")
parser.add_argument("--log_with", help="a tracker of accelerate's, such as tensorboard or wandb (default: none)")
args = parse_arguments(parser, recipes=Path(__file__).parent / "recipes")
config = args.training_config

# 2. Processes, seed and folder.
tidy_output()
output_dir = args.output_dir or Path("runs") / f"{args.method}-{datetime.now():%Y%m%d-%H%M%S}"
accelerator = Accelerator(mixed_precision=args.mixed_precision, log_with=args.log_with, project_dir=output_dir)
output_dir = prepare_output_dir(output_dir, args.settings, args.resume, accelerator)
accelerator.print(f"{args.method} on {args.dataset} by {args.config} -> {output_dir}")
if args.log_with:
    accelerator.init_trackers("hf-tgpt", {name: str(value) for name, value in args.settings.items()})
    if accelerator.is_main_process and not accelerator.trackers:
        raise ValueError(
            f"`log_with`={args.log_with!r} is no tracker that is installed here; install it or leave it out."
        )
set_seed(config.seed)
start = time.perf_counter()

# 3. The base model with its tokenizer and image processor.
model_name = args.model or str(hf_tgpt.TOY_CLIP)
clip = hf_tgpt.load_clip(model_name).to(accelerator.device).eval()
tokenizer = AutoTokenizer.from_pretrained(args.method_config["tokenizer_name_or_path"] or model_name)
processor = CLIPImageProcessorPil.from_pretrained(model_name)

# 4. The images: k per class for training, min(4, k) for validation, the whole test split.
with accelerator.main_process_first():
    splits = load_splits(args.dataset, args.image_column, args.label_column, args.caption_column, seed=config.seed)
names = class_names(splits["train"])
few = sample_few_shot(splits["train"], args.shots, config.seed, allow_fewer=args.allow_fewer)
images = FewShotImages(few, ImageTransform.from_processor(processor, train=True), seed=config.seed)
images.check()
as_is = ImageTransform.from_processor(processor, train=False)
test = evaluation_loader(FewShotImages(splits["test"], as_is), accelerator, config.num_workers)
validation = None
if "validation" in splits:
    few = sample_few_shot(splits["validation"], min(4, args.shots), config.seed, allow_fewer=True)
    validation = evaluation_loader(FewShotImages(few, as_is), accelerator, config.num_workers)
    validation.dataset.check()

# 5. Zero-shot CLIP, to compare with.
templates = args.method_config.get("templates", ["a photo of a {}."])
zero_shot = evaluate(zero_shot_classifier(clip, names, templates, tokenizer), test, accelerator, "zero-shot")

# 6. The adapter, trained.
model = get_peft_model(clip, hf_tgpt.config_class(args.method)(class_names=names, **args.method_config))
history = train(model, images, config, accelerator, output_dir, tokenizer, validation, args.resume)
adapted = evaluate(model, test, accelerator, "testing")

# 7. Saved, reloaded into a fresh CLIP and checked; the seed is another one, so nothing agrees by a common start.
if accelerator.is_main_process:
    model.save_pretrained(output_dir)
    set_seed(config.seed + 1)
    fresh = hf_tgpt.load_clip(model_name).to(accelerator.device)
    fresh = hf_tgpt.load_adapter(fresh, output_dir, torch_device=str(accelerator.device))
    batch = torch.stack([test.dataset[i]["pixel_values"] for i in range(min(8, len(test.dataset)))]).to(
        accelerator.device
    )
    with torch.no_grad(), accelerator.autocast():
        if not torch.equal(fresh(batch).logits.float(), model(batch).logits.float()):
            raise RuntimeError(f"The adapter reloaded from {output_dir} does not give the trained one's logits.")

# 8. results.json, a picture and the model card.
results = summarise(args, config, model, zero_shot, adapted, seconds=time.perf_counter() - start)
if accelerator.is_main_process:
    write_json(output_dir / "results.json", results)
    plot_run(output_dir / "training.png", history, names, zero_shot, adapted)
    write_card(output_dir, model.peft_config["default"], results)
accelerator.print(f"zero-shot accuracy   {zero_shot['accuracy']:.3f}")
accelerator.print(f"adapted accuracy     {adapted['accuracy']:.3f}")
if "wise_ft_accuracy" in adapted:
    accelerator.print(f"with WiSE-FT at 0.5  {adapted['wise_ft_accuracy']:.3f}")
accelerator.print(
    f"The adapter, reloaded from disk, is equal. {results['seconds']:.0f} s; all of it is in {output_dir}"
)
accelerator.end_training()
