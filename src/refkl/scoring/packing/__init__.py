"""Packed batches: no padding, and completions of one prompt share it, if the model allows it."""
