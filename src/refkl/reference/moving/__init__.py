"""Moves of a reference towards its policy: averages, bias correction, LoRA products."""
