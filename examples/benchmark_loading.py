"""Measures how many pictures a second are read, decoded, augmented and batched, to compare with a step's images/s.

python examples/benchmark_loading.py --model openai/clip-vit-base-patch16 --workers 0 2 4
"""

import argparse
import tempfile
import time

import numpy as np
import PIL.Image
from datasets import ClassLabel, Dataset, Features, Image
from torch.utils.data import DataLoader

import hf_tgpt
from hf_tgpt.cli.output import markdown_table
from hf_tgpt.data import Collator, FewShotImages, ImageTransform
from hf_tgpt.encoders.loading import load_image_processor

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(hf_tgpt.TOY_CLIP), help="whose image processor (default: the toy CLIP's)")
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2, 4], help="worker processes")
args = parser.parse_args()


def load(model: str, batch: int, workers: int, count: int = 256) -> dict[str, float]:
    """Pictures a second from JPEG files of a usual size to batches on the CPU."""
    processor = load_image_processor(model)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/0.jpg"
        noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
        PIL.Image.fromarray(noise).resize((500, 375)).save(path)
        features = Features({"image": Image(), "label": ClassLabel(names=["noise"])})
        pictures = Dataset.from_dict({"image": [path] * count, "label": [0] * count}, features=features)
        images = FewShotImages(pictures, ImageTransform.from_processor(processor, train=True))
        loader = DataLoader(images, batch, collate_fn=Collator(), num_workers=workers, persistent_workers=workers > 0)
        list(loader)  # starts the workers
        start = time.perf_counter()
        done = sum(len(part["labels"]) for part in loader)
        seconds = time.perf_counter() - start
    return {"batch": batch, "workers": workers, "pictures": done, "images_per_second": round(done / seconds, 1)}


rows = [load(args.model, args.batch, workers) for workers in args.workers]
print("\n".join(markdown_table(list(rows[0]), [list(row.values()) for row in rows])))
