"""Batches without padding: completions of one prompt share it, where the model allows it."""
