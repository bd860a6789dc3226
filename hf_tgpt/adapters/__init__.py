"""PEFT's view of the methods: their configs, what a learner is, and how it gets onto a transformers model."""

# First of all, so that PEFT is told of the methods (see `hf_tgpt/__init__.py`) before a module here is half read.
import peft  # noqa: F401
