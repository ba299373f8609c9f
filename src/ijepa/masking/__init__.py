"""From masks to packed batches."""
