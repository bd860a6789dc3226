"""Adapters in folders and on the Hub: loaded, published, converted, described on a card."""
