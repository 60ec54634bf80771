"""Scores that are stored on disk and looked up instead of computed again."""
