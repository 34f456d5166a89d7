"""Score an adapter, or a trial's untuned base, as a Ray job:

    ray job submit --working-dir . -- python jobs/evaluate.py configs/trials/lora.yaml

Arguments and exit codes are those of `rankloom evaluate`.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # replace this folder, whose module names are common ones, by the source tree; a wheel needs neither
    sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

    from rankloom.cli import main

    main(["evaluate", *sys.argv[1:]])
