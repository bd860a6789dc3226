"""`python -m hf_tgpt`, the same as the program `hf-tgpt`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
