"""From samples to batches: order, decoding, crops, workers."""
