"""Weights to numbers: linear probe, kNN, segmentation, diagnostics."""
