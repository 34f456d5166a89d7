"""Adapters as PEFT folders: load safely, extract from weight differences, merge, probe, publish foreign ones.

Adapters on a base in memory, many at once, are in `banks/`.
"""
