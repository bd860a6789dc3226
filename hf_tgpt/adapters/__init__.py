"""PEFT's view of the methods: their configs, what a learner is, and how it gets onto a transformers model."""
