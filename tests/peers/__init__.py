"""The published tests of other RLHF libraries, run against refkl's maths (docs/peers.md)."""
