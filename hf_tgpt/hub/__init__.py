"""Adapters in folders and on the Hub: loaded, published, converted, described on a card."""

# First, so that PEFT's hooks are installed (see `hf_tgpt/__init__.py`) before a module here is half imported.
import peft  # noqa: F401
