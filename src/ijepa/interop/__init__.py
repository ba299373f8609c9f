"""Weights: read from this and other libraries, and exported to them."""
