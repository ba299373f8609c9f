"""Linear probes and kNN."""
