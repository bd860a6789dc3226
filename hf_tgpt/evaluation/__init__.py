"""How good a classifier is, and what is published of others."""
