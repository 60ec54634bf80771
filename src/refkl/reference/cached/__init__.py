"""Scores that are kept on disk and looked up instead of computed again."""
