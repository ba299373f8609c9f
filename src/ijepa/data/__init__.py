"""Images to batches: index, sources, decode, crop, order, loader."""
