"""Helpers for files, names and versions. Nothing here imports anything else of the package."""
