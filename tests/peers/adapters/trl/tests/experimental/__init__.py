"""Where TRL's tests are put."""
