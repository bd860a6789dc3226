"""Trains an adapter: `hf-tgpt train` as a script. Its steps are in hf_tgpt/cli/train.py.

accelerate launch examples/train.py
accelerate launch examples/train.py --method maple --model openai/clip-vit-base-patch16 --dataset path/to/pictures
"""

import sys

from hf_tgpt.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
