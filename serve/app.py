"""The import path for Ray Serve in a source tree; see `rankloom.deploy.app`.

serve run serve.app:build base=builtin:smollm2
RANKLOOM_SERVE=configs/serve/banking77.yaml serve build serve.app:app -o deploy.yaml
"""

import os
from typing import Any

from rankloom.config import load
from rankloom.config.serve import ServeConfig
from rankloom.deploy.app import build, build_application

__all__ = ["build"]


def __getattr__(name: str) -> Any:
    """Return `app`, the application of the config that `$RANKLOOM_SERVE` names, made on first use."""
    if name != "app":
        raise AttributeError(name)
    return build_application(load(ServeConfig, os.environ.get("RANKLOOM_SERVE", "serve/banking77.yaml")))
