"""One file for each way to hold a reference."""
