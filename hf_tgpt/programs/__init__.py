"""What `hf-tgpt train`, `evaluate` and `describe` do, each a `main` that reads from top to bottom."""
