"""Trains the toy CLIP that ships with this package, from scratch, on pictures of the toy world.

    python examples/pretrain_tiny_clip.py --output_dir tiny-clip
    python examples/pretrain_tiny_clip.py --family siglip --pictures 20000 --epochs 8 --output_dir tiny-siglip

A `CLIPModel`, or the model of another family, of under two million parameters (64-pixel pictures) with a small
byte-level tokenizer of its own. Its only use is to run this package without a download. One combination in nine of
shape, surface and colour and all domains but "photo" are never shown.
"""

import argparse
import json
import math
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerFast

from hf_tgpt.data.toyworld import scenes as toyscenes
from hf_tgpt.data.toyworld.world import TASKS, load_toyworld
from hf_tgpt.utils.compat import pil_image_processor


@dataclass(frozen=True)
class Family:
    """What a family's model and tokenizer have that CLIP's do not."""

    name: str  # of its classes in transformers, before Config, Model and ImageProcessor
    special: dict[str, str]  # the tokenizer's special tokens, in the order of their ids
    sentence: str  # where they stand in a sentence
    context: int = 77
    image_processor: str = "CLIPImageProcessor"
    text: dict = field(default_factory=dict)  # settings of the text tower; None is the width


FAMILIES = {
    "clip": Family(
        "CLIP", {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}, "<|startoftext|> $A <|endoftext|>"
    ),
    "metaclip_2": Family(
        "MetaClip2",
        {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
        "<s> $A </s>",
    ),
    # It reads padding like words, so a short context saves time.
    "siglip": Family("Siglip", {"eos_token": "</s>"}, "$A </s>", 32, "SiglipImageProcessor", {"projection_size": None}),
    "chinese_clip": Family(
        "ChineseCLIP",
        {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
        "[CLS] $A [SEP]",
        image_processor="ChineseCLIPImageProcessor",
        text={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
}
TEMPLATES = ("a photo of a {}.", "a photo of a {}.", "a picture of a {}.", "this is a {}.", "a {}.")
# A caption names each part of its picture with this chance: shape, surface, colour, background, size, place.
MENTIONED = (0.75, 0.5, 0.5, 0.15, 0.15, 0.15)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="a new folder for the checkpoint")
    parser.add_argument("--family", default="clip", choices=FAMILIES)
    parser.add_argument("--width", type=int, default=128, help="of both towers and of what they share")
    parser.add_argument("--pictures", type=int, default=80_000, help="pictures drawn for training")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    start, family = time.perf_counter(), FAMILIES[args.family]

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
    sentences = [scene.caption for scene in scenes[:5000]] + [t.format("shape") for t in TEMPLATES]
    tokenizer = train_tokenizer(family, sentences)

    # 3. The model.
    model = random_model(family, tokenizer, args.width)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    square = {"height": toyscenes.IMAGE_SIZE, "width": toyscenes.IMAGE_SIZE}
    resized = {"shortest_edge": toyscenes.IMAGE_SIZE} if family.image_processor == "CLIPImageProcessor" else square
    cropped = {} if family.image_processor == "SiglipImageProcessor" else {"crop_size": square}
    processor = pil_image_processor(family.image_processor)(size=resized, **cropped)
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
    warmup = min(300, steps // 5)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, step / warmup) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
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
            logits = model(**tokenize(tokenizer, texts, model), pixel_values=pixels).logits_per_image
            if hasattr(model, "logit_bias"):  # SigLIP: each pair by itself
                loss = F.binary_cross_entropy_with_logits(logits, true) * len(logits)
            else:
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
    model = AutoModel.from_pretrained(args.output_dir)
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
        model_class=f"{FAMILIES[args.family].name}Model",
        options="" if args.family == "clip" else f" --family {args.family} --width {args.width}",
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

A `{model_class}` of {parameters:,} parameters (64-pixel pictures, patches of 16) with a byte-level tokenizer of its
own, trained on drawn pictures of painted shapes. **It is a toy**: it knows twelve shapes, six surfaces, ten colours and
five backgrounds, and nothing else. It exists so that hf-tgpt can be installed, tested and tried without a download.

Made by one command of the repository, `python examples/pretrain_tiny_clip.py{options} --output_dir tiny-clip`, with
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


def train_tokenizer(family: Family, sentences: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in CLIP's manner: lower case, the family's tokens around every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), list(family.special.values())
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=family.sentence, special_tokens=[(t, tokenizer.token_to_id(t)) for t in special]
    )
    tokens = {"pad_token": family.special.get("eos_token")} | family.special
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=family.context, model_input_names=inputs, **tokens
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str], model: PreTrainedModel) -> Any:
    """What the model's call takes of texts; SigLIP is trained on sentences as long as its context."""
    padding = "max_length" if hasattr(model, "logit_bias") else True
    inputs = tokenizer(texts, return_tensors="pt", padding=padding)
    return {"input_ids": inputs.input_ids} if padding == "max_length" else inputs


def random_model(
    family: Family, tokenizer: PreTrainedTokenizerFast, width: int, layers: tuple[int, int] = (3, 5)
) -> PreTrainedModel:
    """With so many layers in the text and in the image tower."""
    tower = dict(hidden_size=width, intermediate_size=4 * width, num_attention_heads=4)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = getattr(transformers, f"{family.name}Config")(
        projection_dim=width,
        text_config=tower
        | ids
        | dict(num_hidden_layers=layers[0], vocab_size=len(tokenizer), max_position_embeddings=family.context)
        | {name: width if value is None else value for name, value in family.text.items()},
        vision_config=tower | dict(num_hidden_layers=layers[1], image_size=toyscenes.IMAGE_SIZE, patch_size=16),
    )
    model = getattr(transformers, f"{family.name}Model")(config)
    if hasattr(model, "logit_bias"):  # as SigLIP's paper starts
        torch.nn.init.constant_(model.logit_scale, math.log(10))
        torch.nn.init.constant_(model.logit_bias, -10.0)
    return model


@torch.no_grad()
def zero_shot(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, processor: Any, task: str, domain: str
) -> float:
    """Accuracy of "a photo of a {class}." on a task's test split."""
    model.eval()
    data = load_toyworld(task, domain, train_per_class=1, validation_per_class=1)["test"]
    names = data.features["label"].names
    texts = tokenize(tokenizer, [f"a photo of a {name}." for name in names], model)
    pixels = processor(data["image"][:], return_tensors="pt").pixel_values
    logits = model(**texts, pixel_values=pixels).logits_per_image
    return (logits.argmax(-1) == torch.tensor(data["label"][:])).float().mean().item()


if __name__ == "__main__":
    main()
