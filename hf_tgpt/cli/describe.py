"""Writes a description of every training image with a vision-language model, as training data for TGP-T.

Any image-to-text or vision-language model of the Hub can be used. The output has one JSON line per image; a stopped
command continues where it left off. A file that describes all training images may be the `captions.jsonl` in the folder
of the pictures.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin

from ..data import class_names, decode_image, load_splits, sample_few_shot
from ..data.readers.captions import image_key, undecoded_images
from ..encoders.loading import check_device
from ..utils.files import parse_json
from .options import CommandParser, add_json, at_least_one, underscored, whole_number
from .output import list_remarks, make_room_for, tidy_output
from .words import speak_of

EXAMPLES = """
hf-tgpt describe --model llava-hf/llava-interleave-qwen-0.5b-hf --dataset pictures --output new.jsonl
hf-tgpt describe --model Salesforce/blip-image-captioning-base --dataset dtd --shots 16 --output dtd.jsonl
"""
QUESTION = "Describe the {class} in this image in one sentence."


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Writes the descriptions; `argv` defaults to that of the process.

    Raises ValueError for an output that was started by another model or has other content, and leaves it unchanged.
    """
    # 1. Arguments.
    options = parser(prog)
    args = options.parse_args(underscored(sys.argv[1:] if argv is None else argv))
    speak_of(options)
    check_device(args.device)
    tidy_output()

    # 2. The images, and those described by an earlier call.
    columns = {"image_column": args.image_column, "label_column": args.label_column}
    named = {"splits": args.splits, "draw": args.draw, "class_names_file": args.class_names_file}
    with list_remarks():
        train = load_splits(args.dataset, **columns, seed=args.seed, skip_damaged=True, **named)["train"]
    if args.shots is not None:
        train = sample_few_shot(train, args.shots, args.seed, allow_fewer=args.allow_fewer)
    names, images = class_names(train), undecoded_images(train)
    root = Path(args.dataset.rpartition(":")[2]).expanduser().absolute()
    make_room_for(args.output)
    draft = args.output.with_name(args.output.name + ".part")
    begun = next((file for file in (draft, args.output) if file.exists()), None)
    described = _described(begun, draft, args.model) if begun else set()
    keys = [image_key(record, root) for record in images]
    first = {key: row for row, key in reversed(list(enumerate(keys)))}  # equal pictures share one key and one sentence
    rows = [row for row, key in enumerate(keys) if key not in described and first[key] == row]
    before = sum(key in described for key in keys)
    if not args.json:
        print(f"{len(train)} images, {before} of them already described")

    # 3. The model.
    try:
        processor = AutoProcessor.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`model`={args.model!r}: no processor could be loaded from it ({error}); correct the name, or connect to "
            "the Hub to have it fetched."
        ) from error
    if not hasattr(processor, "tokenizer"):
        raise ValueError(f"`model`={args.model!r} writes no text; name an image-to-text or vision-language model.")
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=dtype).to(args.device).eval()
    processor.tokenizer.padding_side = "left"  # generation continues at the right
    chats = getattr(processor, "chat_template", None) is not None
    request = args.prompt if args.prompt is not None else QUESTION if chats else ""

    # 4. A sentence for each image.
    silent = 0
    with draft.open("a", encoding="utf-8") as file:
        progress = tqdm(total=len(rows), desc="describing", unit=" images", disable=None)
        for start in range(0, len(rows), args.batch_size):
            batch = rows[start : start + args.batch_size]
            called = [names[train[row]["label"]] for row in batch]
            prompts = [_prompt(request.replace("{class}", name), processor if chats else None) for name in called]
            pictures = [decode_image(images[row], name_hint=f"row {row}") for row in batch]
            texts = {"text": prompts, "padding": True} if request or chats else {}
            inputs = processor(images=pictures, **texts, return_tensors="pt").to(args.device, dtype)
            with torch.inference_mode():
                ids = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
            prompt_ids = inputs.get("input_ids")
            if (
                prompt_ids is not None
                and ids.shape[1] >= prompt_ids.shape[1]
                and torch.equal(ids[:, : prompt_ids.shape[1]], prompt_ids)
            ):
                ids = ids[:, prompt_ids.shape[1] :]  # a decoder-only model repeats its input
            for row, name, sent, text in zip(
                batch, called, prompts, processor.batch_decode(ids, skip_special_tokens=True), strict=True
            ):
                caption = " ".join(text.split())
                if not chats and sent and caption.lower().startswith(sent.lower()):
                    caption = caption[len(sent) :].strip()
                silent += not caption
                caption = caption or f"a photo of a {name}."
                entry = {"file_name": keys[row], "caption": caption, "class": name, "model": args.model}
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            file.flush()
            progress.update(len(batch))
        progress.close()
    os.replace(draft, args.output)
    if args.json:
        facts = {"output": str(args.output), "images": len(train), "described_before": before, "silent": silent}
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    print(f"{len(train)} descriptions in {args.output}")
    if silent:
        print(f'The model gave no description of {silent} images; "a photo of a CLASS." is used instead.')


def parser(prog: str | None = None) -> CommandParser:
    """The command's parser."""
    parser = CommandParser(prog, description=__doc__, usage="%(prog)s [options]", examples=EXAMPLES)
    add = parser.add_argument
    add("--model", required=True, help="Hub id or folder of an image-to-text or vision-language model")
    add("--dataset", required=True, help="the data set, as for training")
    add("--output", type=Path, required=True, help="the file of JSON lines; an unfinished one is continued")
    add("--splits", help="a CoOp split file for the pictures of a folder")
    add("--draw", help="a published few-shot draw")
    add("--class_names_file", help="a file of the class names")
    for column in ("image", "label"):
        add(f"--{column}_column", help=f"the {column} column (default: found by its type)")
    add("--shots", type=at_least_one, help="images per class, the same as in training (default: all)")
    add("--seed", type=whole_number, default=0, help="the seed of that draw (default: %(default)s)")
    add("--allow_fewer", action="store_true", help="accept classes with fewer images than shots")
    add("--prompt", help=f"the request, in which {{class}} is replaced by the class name (default: {QUESTION!r} for a "
        "chat model; none for a captioning model, which would continue it instead of answering)")  # fmt: skip
    add("--batch_size", type=at_least_one, default=8, help="images per batch (default: %(default)s)")
    add(
        "--max_new_tokens", type=at_least_one, default=60, help="maximum length of a description (default: %(default)s)"
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    add_json(parser)
    parser.lead_with("model", "dataset", "output", "shots", "prompt", "json")
    return parser


def _described(begun: Path, draft: Path, model: str) -> set[str]:
    """The images that a file describes, which becomes `draft`; an incomplete last line of a draft is removed."""
    content = begun.read_bytes()
    if begun == draft:
        content = content[: content.rfind(b"\n") + 1]
    elif content and not content.endswith(b"\n"):
        content += b"\n"
    described = set()
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        place = f"`output`={str(begun)!r}, line {number}"
        entry = parse_json(line, place)
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            raise ValueError(f"{place} describes no image; choose another file.")
        if entry.get("model") != model:
            raise ValueError(f"`output`={str(begun)!r} was written by {entry.get('model')!r}; choose another file.")
        described.add(entry["file_name"])
    draft.write_bytes(content)
    return described


def _prompt(request: str, processor: ProcessorMixin | None) -> str:
    """The request about one image as the model reads it; with a processor, as a turn of a chat."""
    if processor is None:
        return request
    content = [{"type": "image"}, {"type": "text", "text": request}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
