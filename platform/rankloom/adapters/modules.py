"""Makes PEFT adapt exactly the modules that a config names.

For mixture-of-experts models PEFT reads `gate_proj`, `up_proj`, `down_proj` (Mixtral's `w1` and so on) as transformers
4 named the experts' layers, and moves the adapter from the modules that have these names today (dense layers, shared
experts) onto the parameters of all routed experts. Here an adapter always stays on what `find_target_linears` returns.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.utils import transformers_weight_conversion

_LOCK = threading.RLock()


@contextmanager
def use_exact_module_names() -> Iterator[None]:
    """Make PEFT put adapters where a config says, on mixture-of-experts models too, inside the context."""
    with _LOCK:
        before = transformers_weight_conversion.convert_peft_config_for_transformers
        transformers_weight_conversion.convert_peft_config_for_transformers = _keep_config
        try:
            yield
        finally:
            transformers_weight_conversion.convert_peft_config_for_transformers = before


def _keep_config(config: Any, model: Any, conversions: Any) -> None:
    """Leave the config unchanged."""
