"""What a trained encoder is for: evaluate, verify, bundle, registry, fill_mask."""
