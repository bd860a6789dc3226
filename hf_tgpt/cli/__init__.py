"""The program `hf-tgpt`."""
