"""Trained classifiers at work: on pictures of any kind, explained, exported, on a web page."""
