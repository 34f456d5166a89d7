"""Search over trials as a Ray job, on a cluster that has rankloom's dependencies but need not have rankloom:

    ray job submit --working-dir . -- python jobs/tune.py configs/studies/quickstart.yaml search.num_trials=8

Arguments and exit codes are those of `rankloom tune`.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # replace this folder, whose module names are common ones, by the source tree; a wheel needs neither
    sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

    from rankloom.cli import main

    main(["tune", *sys.argv[1:]])
