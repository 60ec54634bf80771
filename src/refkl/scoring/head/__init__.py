"""The output head: found by a probe, and redirected to the fused operation during a forward pass."""
