"""Evaluates a trained adapter, or a reference such as LoRA, on any data set beside zero-shot CLIP. It never trains.

    python examples/evaluate.py --adapter runs/maple --dataset path/to/other/pictures
    python examples/evaluate.py --adapter runs/maple --dataset toyworld:shapes/fog --classes new
    python examples/evaluate.py --adapter runs/tgpt --dataset toyworld:codes --change wise_ft=0.3
    python examples/evaluate.py --adapter runs/maple --dataset oxford_pets --classes new --compare-with-published

A method that classifies by text takes the data set's own class names; one whose classes are fixed has to know them all,
and is then scored among those alone.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path[:] = [path for path in sys.path if Path(path) != Path(__file__).parent]  # evaluate.py there hides the library

from accelerate import Accelerator
from transformers import CLIPImageProcessorPil

import hf_tgpt
from hf_tgpt.arguments import add_data_arguments, data_arguments, zero_shot_templates
from hf_tgpt.checkpoint import write_json
from hf_tgpt.data import FewShotImages, ImageTransform, choose_classes, class_names, load_splits
from hf_tgpt.evaluation import UnknownClasses, evaluate, evaluation_loader, for_classes, measure, predict
from hf_tgpt.loading import base_model_of, change_config, load_trained, make_classifier, results_of
from hf_tgpt.published import BACKBONE, published_beside, read_published
from hf_tgpt.references import ZeroShot
from hf_tgpt.report import library_versions, markdown_table, plot_classes, tidy_output

# 1. Arguments.
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
)
parser.add_argument("--adapter", required=True, help="a folder that train.py wrote, or an adapter's id on the Hub")
add_data_arguments(parser)
parser.add_argument("--change", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of the adapter's config to "
                    "change; tells how its answers agree with the unchanged adapter's")  # fmt: skip
parser.add_argument("--templates", nargs="+", help="zero-shot's (default: a known data set's, or 'a photo of a {}.')")
parser.add_argument("--seed", type=int, default=0, help="of the split, where the data set comes without one")
parser.add_argument("--num_workers", type=int, default=0, help="processes that decode images")
parser.add_argument("--mixed_precision", choices=["no", "bf16", "fp16"], help="(default: as accelerate is set up)")
parser.add_argument("--compare-with-published", action="store_true", help="print the published accuracies of the same "
                    "training and test beside this one (examples/recipes/published.csv)")  # fmt: skip
parser.add_argument("--picture", type=Path, help="a .png file for the change of each class and the confusions")
parser.add_argument("--output", type=Path, help="a JSON file for the results (default: they are only printed)")
args = parser.parse_args()


def write(results: dict) -> None:
    if args.output and accelerator.is_main_process:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, results | {"versions": library_versions()})


# 2. The base model that the adapter was trained on, unless another copy of it is named; the test pictures.
tidy_output()
accelerator = Accelerator(mixed_precision=args.mixed_precision)
start = time.perf_counter()
published = []
if args.compare_with_published:
    rows = read_published(Path(__file__).parent / "recipes" / "published.csv")
    published = published_beside(rows, results_of(args.adapter), args.dataset, args.classes)
model_name = args.model or base_model_of(args.adapter)
clip = hf_tgpt.load_clip(model_name).to(accelerator.device).eval()
processor = CLIPImageProcessorPil.from_pretrained(model_name)
with accelerator.main_process_first():
    splits = choose_classes(load_splits(**data_arguments(args), seed=args.seed), args.classes)
names = class_names(splits["test"])
images = FewShotImages(splits["test"], ImageTransform.from_processor(processor, train=False))
test = evaluation_loader(images, accelerator, args.num_workers)

# 3. Zero-shot and the adapter on the same pictures.
results = {"adapter": args.adapter, "dataset": args.dataset, "classes": args.classes, "images": len(images)}
trained = load_trained(clip, args.adapter)
changes = dict(change.partition("=")[::2] for change in args.change)
unchanged = change_config(trained, changes) if changes else {}
try:
    model = for_classes(trained, names)
except UnknownClasses as error:
    write(results | {"accuracy": None, "refused": str(error)})
    raise SystemExit(str(error)) from None
plain = hf_tgpt.load_clip(model_name).to(accelerator.device).eval()
plain = make_classifier("zero-shot", plain, names, **zero_shot_templates(args, names, args.templates))
if type(trained) is ZeroShot:  # asks each data set in that one's words
    model = plain
zero_shot = evaluate(plain, test, accelerator, "zero-shot")
if changes:
    changed = predict(model, test, accelerator, "testing, changed")
    change_config(trained, unchanged)
predictions = predict(model, test, accelerator, "testing")
adapted = measure(predictions)
if changes:
    same = predictions["logits"].argmax(-1) == changed["logits"].argmax(-1)
    largest = abs(predictions["logits"] - changed["logits"]).max()
    results["changed"] = {
        "fields": changes,
        "accuracy": measure(changed)["accuracy"],
        "same_answers": float(same.mean()),
        "largest_difference_of_logits": float(largest),
    }

# 4. Results.
seconds = round(time.perf_counter() - start, 1)
if published:
    results["published"] = [{name: row[name] for name in ("method", "accuracy", "source")} for row in published]
write(results | {"zero_shot_accuracy": zero_shot["accuracy"], **adapted, "seconds": seconds})
if args.picture and accelerator.is_main_process:
    plot_classes(args.picture, names, zero_shot, adapted, predictions["logits"].argmax(-1), predictions["labels"])
accelerator.print(f"{args.adapter} on {args.dataset}, {args.classes} classes ({len(names)}), {len(images)} pictures")
accelerator.print(f"zero-shot accuracy   {zero_shot['accuracy']:.3f}")
accelerator.print(f"adapted accuracy     {adapted['accuracy']:.3f}")
if "wise_ft_accuracy" in adapted:
    accelerator.print(f"with WiSE-FT at 0.5  {adapted['wise_ft_accuracy']:.3f}")
if args.change:
    changed = results["changed"]
    accelerator.print(f"with {' '.join(args.change)}: {changed['accuracy']:.3f}, {changed['same_answers']:.1%} of the "
                      f"answers as before, logits up to {largest:.2g} apart")  # fmt: skip
if published:
    ours = [f"measured: {args.adapter} on {model_name}", f"{100 * adapted['accuracy']:.2f}", "this run"]
    theirs = [[f"{row['method']} on {BACKBONE}", f"{row['accuracy']:.2f}", row["source"]] for row in published]
    accelerator.print("\n".join(["", *markdown_table(["", "accuracy, percent", "source"], [ours, *theirs])]))
