"""A reference whose linear layers are held in fewer bits, and the KL floor that this causes."""
