"""Adapters in folders and on the Hub: loaded, published, converted, described on a card."""

# First of all, so that PEFT is told how to publish (see `hf_tgpt/__init__.py`) before a module here is half read.
import peft  # noqa: F401
