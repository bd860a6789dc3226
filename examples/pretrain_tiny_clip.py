"""Trains the toy CLIP that ships with this package, from nothing, on pictures of the toy world.

    python examples/pretrain_tiny_clip.py --output_dir tiny-clip

A `CLIPModel` of under two million parameters (64-pixel pictures) with a small byte-level tokenizer of its own. Its only
use is to run this package without a download. One combination in nine of shape, surface and colour and all domains
but "photo" are never shown.
"""

import argparse
import json
import math
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

from hf_tgpt.data.toyworld import scenes as toyscenes
from hf_tgpt.data.toyworld.world import TASKS, load_toyworld

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
TEMPLATES = ("a photo of a {}.", "a photo of a {}.", "a picture of a {}.", "this is a {}.", "a {}.")
# A caption names each part of its picture with this chance: shape, surface, colour, background, size, place.
MENTIONED = (0.75, 0.5, 0.5, 0.15, 0.15, 0.15)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="a new folder for the checkpoint")
    parser.add_argument("--pictures", type=int, default=80_000, help="pictures drawn for training")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    start = time.perf_counter()

    # 1. Draw the pictures, without the held-out combinations.
    scenes: list[toyscenes.Scene] = []
    while len(scenes) < args.pictures:
        scene = toyscenes.sample_scene(rng)
        if not toyscenes.is_held_out(scene.shape, scene.surface, scene.colour):
            scenes.append(scene)
    with ProcessPoolExecutor() as pool:
        pictures = torch.from_numpy(np.stack(list(tqdm(pool.map(draw, scenes, chunksize=500), total=len(scenes)))))
    facts = np.array([facts_of(scene) for scene in scenes])

    # 2. A tokenizer that knows the toy world's words whole and spells every other word.
    tokenizer = train_tokenizer([scene.caption for scene in scenes[:5000]] + [t.format("shape") for t in TEMPLATES])

    # 3. The model.
    model = CLIPModel(clip_config(tokenizer))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    processor = CLIPImageProcessor(
        size={"shortest_edge": toyscenes.IMAGE_SIZE},
        crop_size={"height": toyscenes.IMAGE_SIZE, "width": toyscenes.IMAGE_SIZE},
    )
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (processor.image_mean, processor.image_std))

    # 4. Contrastive training. Many captions of a batch are true of several pictures, so each direction's target is
    #    spread over all of them instead of calling a true sentence a negative.
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.98),
    )
    steps = args.epochs * (len(scenes) // args.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, step / 300) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    model.train()
    progress = tqdm(total=steps)
    for _ in range(args.epochs):
        order = rng.permutation(len(scenes))
        for batch in order[: len(order) // args.batch_size * args.batch_size].reshape(-1, args.batch_size):
            told = rng.random((len(batch), 6)) < MENTIONED
            told[~told.any(1), 0] = True
            texts = [sentence(scenes[i], t, rng) for i, t in zip(batch, told, strict=True)]
            true = torch.from_numpy(((facts[batch][:, None] == facts[batch][None]) | ~told[None]).all(-1)).float()
            pixels = (pictures[batch].permute(0, 3, 1, 2).float() / 255 - mean) / std
            tokens = tokenizer(texts, return_tensors="pt", padding=True)
            logits = model(input_ids=tokens.input_ids, pixel_values=pixels).logits_per_image
            loss = F.cross_entropy(logits, true / true.sum(1, keepdim=True))
            loss = (loss + F.cross_entropy(logits.T, true.T / true.T.sum(1, keepdim=True))) / 2
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            model.logit_scale.data.clamp_(max=math.log(100))
            progress.update()
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            if progress.n % 500 == 0:
                probe = zero_shot(model, tokenizer, processor, "shapes", "photo")
                tqdm.write(f"step {progress.n} loss {loss.item():.3f} zero-shot on shapes {probe:.3f}")
                model.train()
    progress.close()

    # 5. Save in half precision on disk, float32 when loaded, and measure what was saved.
    tokenizer.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    model.half().save_pretrained(args.output_dir)
    config = json.loads((args.output_dir / "config.json").read_text())
    (args.output_dir / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    model = CLIPModel.from_pretrained(args.output_dir)
    minutes = (time.perf_counter() - start) / 60
    accuracies = {
        task: [zero_shot(model, tokenizer, processor, task, domain) for domain in toyscenes.DOMAINS] for task in TASKS
    }
    card = model_card(sum(p.numel() for p in model.parameters()), args, minutes, accuracies)
    (args.output_dir / "README.md").write_text(card)
    print(card)


def model_card(parameters: int, args: argparse.Namespace, minutes: float, accuracies: dict[str, list[float]]) -> str:
    rows = [
        f"| {task} ({len(TASKS[task])}) | {' | '.join(f'{value:.3f}' for value in values)} |"
        for task, values in accuracies.items()
    ]
    return CARD.format(
        parameters=parameters,
        pictures=args.pictures,
        epochs=args.epochs,
        minutes=minutes,
        domains=" | ".join(toyscenes.DOMAINS),
        rule="|".join(["---"] * (1 + len(toyscenes.DOMAINS))),
        rows="\n".join(rows),
    )


CARD = """---
library_name: transformers
license: apache-2.0
tags: [clip, toy]
---

# The toy CLIP of hf-tgpt

A `CLIPModel` of {parameters:,} parameters (64-pixel pictures, patches of 16) with a byte-level tokenizer of its own,
trained on drawn pictures of painted shapes. **It is a toy**: it knows twelve shapes, six surfaces, ten colours and five
backgrounds, and nothing else. It exists so that hf-tgpt can be installed, tested and tried without a download.

Made by one command of the repository, `python examples/pretrain_tiny_clip.py --output_dir tiny-clip`, with
{pictures:,} pictures and {epochs} epochs in {minutes:.0f} minutes.

One combination in nine of shape, surface and colour was held out of its training (the task unseen_triples), and of the
domains it saw "photo" only. Zero-shot accuracy of "a photo of a {{class}}." on the test splits, as that command prints
it; in brackets the number of classes, and the classes of "codes" have names that say nothing:

| task | {domains} |
|{rule}|
{rows}

The weights are stored in float16 and load as float32.
"""


def draw(scene: toyscenes.Scene) -> np.ndarray:
    return np.asarray(toyscenes.draw(scene))


def facts_of(scene: toyscenes.Scene) -> tuple[int, ...]:
    """What can be said of a scene, as six integers in the order of MENTIONED."""
    size = ("small", "medium", "large").index(scene.size_word)
    place = 3 * ((scene.y > -0.1) + (scene.y > 0.1)) + (scene.x > -0.1) + (scene.x > 0.1)
    return scene.shape, scene.surface, scene.colour, scene.background, size, place


def sentence(scene: toyscenes.Scene, told: np.ndarray, rng: np.random.Generator) -> str:
    """A caption that mentions the told parts, in the word order of the toy world's own captions."""
    words = [
        scene.size_word if told[4] else "",
        toyscenes.SURFACES[scene.surface] if told[1] else "",
        list(toyscenes.COLOURS)[scene.colour] if told[2] else "",
        toyscenes.SHAPES[scene.shape] if told[0] else "shape",
        f"in the {scene.place_word}" if told[5] else "",
        f"on a {list(toyscenes.BACKGROUNDS)[scene.background]} background" if told[3] else "",
    ]
    return TEMPLATES[rng.integers(len(TEMPLATES))].format(" ".join(word for word in words if word))


def train_tokenizer(sentences: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in CLIP's manner: lower case, BOS and EOS around every text, padding with EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=alphabet, special_tokens=[BOS, EOS], show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(t, tokenizer.token_to_id(t)) for t in (BOS, EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS, model_max_length=77
    )


def clip_config(tokenizer: PreTrainedTokenizerFast) -> CLIPConfig:
    return CLIPConfig(
        projection_dim=128,
        text_config=dict(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=len(tokenizer),
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        vision_config=dict(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=5,
            num_attention_heads=4,
            image_size=toyscenes.IMAGE_SIZE,
            patch_size=16,
        ),
    )


@torch.no_grad()
def zero_shot(
    model: CLIPModel, tokenizer: PreTrainedTokenizerFast, processor: CLIPImageProcessor, task: str, domain: str
) -> float:
    """Accuracy of "a photo of a {class}." on a task's test split."""
    model.eval()
    data = load_toyworld(task, domain, train_per_class=1, validation_per_class=1)["test"]
    names = data.features["label"].names
    texts = tokenizer([f"a photo of a {name}." for name in names], return_tensors="pt", padding=True)
    pixels = processor(data["image"][:], return_tensors="pt").pixel_values
    logits = model(input_ids=texts.input_ids, pixel_values=pixels).logits_per_image
    return (logits.argmax(-1) == torch.tensor(data["label"][:])).float().mean().item()


if __name__ == "__main__":
    main()
