"""A reference in host memory that visits the device layer by layer."""
