"""Data: a source's rows become messages, then tokens with loss weights, then batches.

`load_data` is the entry point: sources.py finds and reads rows, messages.py turns them into messages, render.py those
into tokens (through template.py and encode.py, which serving uses too), split.py splits parts off, check.py counts
problems, rows.py keeps the result on disk, batching.py makes batches for the loop.
"""

from rankloom.data.batching import Batch, Cursor, collate, find_longest_batch
from rankloom.data.check import DataReport, SplitReport
from rankloom.data.load import TaskData, check_heads, load_data
from rankloom.data.render import Row
from rankloom.data.rows import Rows
from rankloom.data.sources import READ_BYTES, check_sources

__all__ = [
    "READ_BYTES",
    "Batch",
    "Cursor",
    "DataReport",
    "Row",
    "Rows",
    "SplitReport",
    "TaskData",
    "check_heads",
    "check_sources",
    "collate",
    "find_longest_batch",
    "load_data",
]
