"""OpenRLHF's tests load this file; nothing in it is refkl's."""
