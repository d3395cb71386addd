"""Global batches to a trained encoder: feed, loop, checkpoint, tracking."""
