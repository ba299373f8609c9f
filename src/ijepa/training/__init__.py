"""Batches to weights: the loop, the optimiser, schedules, checkpoints and what is written of a run."""
