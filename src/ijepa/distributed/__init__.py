"""Several processes: joining them, collectives, shards of tensors, and finding ranks that are lost or slow."""
