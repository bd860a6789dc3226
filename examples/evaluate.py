"""Evaluates an adapter on any data set: `hf-tgpt evaluate` as a script. Its steps are in hf_tgpt/cli/evaluate.py.

python examples/evaluate.py --adapter runs/maple --dataset path/to/other/pictures
"""

import sys
from pathlib import Path

sys.path[:] = [path for path in sys.path if Path(path) != Path(__file__).parent]  # evaluate.py there hides the library

from hf_tgpt.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
