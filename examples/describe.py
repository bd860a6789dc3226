"""Describes training images: `hf-tgpt describe` as a script. Its steps are in hf_tgpt/cli/describe.py.

python examples/describe.py --model llava-hf/llava-interleave-qwen-0.5b-hf --dataset pictures --output new.jsonl
"""

import sys
from pathlib import Path

sys.path[:] = [path for path in sys.path if Path(path) != Path(__file__).parent]  # evaluate.py there hides the library

from hf_tgpt.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["describe", *sys.argv[1:]]))
