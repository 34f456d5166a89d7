"""Base models: `load.py` loads a model id as a frozen `Base`, `linears.py` finds the parts that adapters can adapt.

`folder.py` finds or converts the files, `checkpoints.py` inspects them, `onednn.py` speeds up some CPUs and `fused.py`
CUDA, `device.py` reports on a device and its memory.
"""

from rankloom.models.checkpoints import fingerprint
from rankloom.models.folder import is_on_hub, locate_folder
from rankloom.models.linears import (
    check_experts,
    chooses_experts,
    find_decoder_layers,
    find_experts,
    find_idle_linears,
    find_shared_inputs,
    find_target_linears,
    get_linear_widths,
    is_linear,
    list_endings,
    skips_layers,
)
from rankloom.models.load import (
    Base,
    choose_auto_dtype,
    detect_quantization,
    load_base,
    load_outline,
    load_shell,
    load_tokenizer,
    reload_weights,
    resolve_dtype,
)

__all__ = [
    "Base",
    "check_experts",
    "choose_auto_dtype",
    "chooses_experts",
    "detect_quantization",
    "find_decoder_layers",
    "find_experts",
    "find_idle_linears",
    "find_shared_inputs",
    "find_target_linears",
    "fingerprint",
    "get_linear_widths",
    "is_linear",
    "is_on_hub",
    "list_endings",
    "load_base",
    "load_outline",
    "load_shell",
    "load_tokenizer",
    "locate_folder",
    "reload_weights",
    "resolve_dtype",
    "skips_layers",
]
