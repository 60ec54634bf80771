"""TRL's names for what refkl holds."""
