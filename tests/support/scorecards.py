"""Values for results that are made up, as a scorecard has them."""

from __future__ import annotations

from typing import Any

COSTS: dict[str, Any] = {
    "trainable_parameters": 10,
    "adapter_bytes": 40,
    "peak_memory_bytes": 100,
    "steps": 6,
    "train_tokens": 600,
    "train_s": 1.5,
    "tokens_per_s": 400.0,
    "device": "cpu x 2",
}
"""What a training took."""
