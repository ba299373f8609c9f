"""Recipes: their fields, presets and files."""
