"""Uses trained classifiers: predicts, explains, exports, and serves them."""
