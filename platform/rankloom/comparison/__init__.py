"""Comparisons: several methods on one task, read_measure, with intervals and tests.

`compare.py` runs one, from its config to its result: read it first. `studies.py` makes the studies that train.
`analysis.py` makes the result of what they left: `outcomes.py` reads the results on each test row, `statistics.py` has
intervals and tests, `table.py` the table, `verdict.py` the words. `export.py` writes the files.
"""
