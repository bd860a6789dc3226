"""Metrics, comparisons, plots and published results."""
