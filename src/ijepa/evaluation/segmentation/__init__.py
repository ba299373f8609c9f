"""Segmentation protocols."""
