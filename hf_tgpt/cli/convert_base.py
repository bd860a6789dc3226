"""`hf-tgpt convert-base`: open_clip's files of a plain CLIP as a folder of transformers."""

from __future__ import annotations

import argparse
import json

from ..hub.convert_base import convert_base
from .output import tidy_output


def main(args: argparse.Namespace) -> int:
    """Writes the folder and prints what was converted."""
    tidy_output()
    facts = convert_base(args.file, args.to, activation=args.activation, heads=args.heads, tokenizer=args.tokenizer)
    if args.json:
        print(json.dumps({"output": args.to} | facts, indent=2))
        return 0
    print(
        f"A CLIPModel with {facts['activation']}, {facts['heads'][0]} and {facts['heads'][1]} heads (image and text "
        f"tower), {facts['image_size']} pixels in patches of {facts['patch_size']}, {facts['context_length']} tokens "
        f"and {facts['dtype']} weights is in {args.to}"
    )
    return 0
