"""Batches to weights: the training loop, the optimizer, schedules, and what a run writes about itself."""
