"""Helpers that know nothing of the rest: errors, files, random numbers, environment."""
