"""Adapters as PEFT folders: load safely, extract from weight differences, merge, probe, publish.

`banks/` holds many adapters on one base in memory.
"""
