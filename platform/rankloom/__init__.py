"""rankloom: fine-tune, search and serve low-rank adapters on Ray.

Importing this package loads neither torch nor ray. Read `training/loop.py` first.
"""

__version__ = "0.1.0"
