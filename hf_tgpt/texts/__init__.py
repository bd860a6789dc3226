"""From class names to sentences to features."""
