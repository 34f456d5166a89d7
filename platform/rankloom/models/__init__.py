"""Base models: `load.py` makes a frozen `Base` of a model id, `linears.py` finds what adapters can sit on.

`folder.py` finds or converts the files, `checkpoints.py` reads what they say of themselves, `onednn.py` speeds up some
CPUs, `device.py` asks a device for its memory.
"""

from rankloom.models.checkpoints import fingerprint
from rankloom.models.folder import is_on_hub, local_folder
from rankloom.models.linears import (
    bypassed,
    check_experts,
    chooses_experts,
    decoder_layers,
    endings,
    find_experts,
    find_target_linears,
    in_out,
    is_linear,
    skips_layers,
)
from rankloom.models.load import (
    Base,
    auto_dtype,
    load_base,
    load_outline,
    load_shell,
    load_tokenizer,
    reload_weights,
    resolve_dtype,
    stored_as,
)

__all__ = [
    "Base",
    "auto_dtype",
    "bypassed",
    "check_experts",
    "chooses_experts",
    "decoder_layers",
    "endings",
    "find_experts",
    "find_target_linears",
    "fingerprint",
    "in_out",
    "is_linear",
    "is_on_hub",
    "load_base",
    "load_outline",
    "load_shell",
    "load_tokenizer",
    "local_folder",
    "reload_weights",
    "resolve_dtype",
    "skips_layers",
    "stored_as",
]
