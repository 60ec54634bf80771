"""A reference in host memory whose weights are moved to the device layer by layer."""
