"""Compare methods as a Ray job, on a cluster that has rankloom's dependencies but need not have rankloom:

    ray job submit --working-dir . -- python jobs/compare.py configs/compare/quick.yaml 'seeds=[0]'

Arguments and exit codes are those of `rankloom compare`.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # replace this folder, whose module names are common ones, by the source tree; a wheel needs neither
    sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

    from rankloom.cli import main

    main(["compare", *sys.argv[1:]])
