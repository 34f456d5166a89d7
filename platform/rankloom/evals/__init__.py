"""Measures, one per file; `score.py` gathers them into Measures. Read `loss.py` first: training uses it too."""
