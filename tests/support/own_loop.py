"""The run of a loop of one's own that several tests repeat."""

from __future__ import annotations

OWN_LOOP = ("--gradient_accumulation_steps", "1", "--gradient_clipping", "1.0")
