"""Compares methods: `hf-tgpt compare` as a script. Its steps are in hf_tgpt/cli/compare.py.

python examples/compare.py --dataset path/to/pictures
"""

import sys
from pathlib import Path

sys.path[:] = [path for path in sys.path if Path(path) != Path(__file__).parent]  # evaluate.py there hides the library

from hf_tgpt.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
