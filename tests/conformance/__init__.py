"""Conformance: every registered layer class, inside a tiny model of its own, against the stock model."""
