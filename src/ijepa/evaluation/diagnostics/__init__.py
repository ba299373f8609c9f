"""Figures without labels, and warnings."""
