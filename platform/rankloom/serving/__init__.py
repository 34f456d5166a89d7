"""Serving without Ray: one base, every adapter, rows of one batch on different ones.

`protocol.py` is what whoever serves an engine knows of it, and imports no torch. `engine.py` is ours, around the
`step()` of `core.py`: begin there.
"""
