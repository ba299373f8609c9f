"""Measures of feature quality without labels, and warnings about a run."""
