"""PEFT's view of the methods: their configs, what a learner is, and how it gets onto a transformers model."""

# First, so that the methods are registered (see `hf_tgpt/__init__.py`) before a module here is half imported.
import peft  # noqa: F401
