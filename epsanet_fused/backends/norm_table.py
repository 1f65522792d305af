"""Where "auto" takes psa_tail_norm for the tail, the norm and the relu of a block in training.

For a device type, the backend whose psa_tail_norm was measured there to be faster than the three by
themselves, forward and backward together, at the sizes of all four stages and in both memory
formats. No card has been measured yet.
"""

from __future__ import annotations

TABLE: dict[str, str] = {"cpu": "cpu"}
