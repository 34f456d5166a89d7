"""Adapters as folders that PEFT reads: `adapter_config.json` and `adapter_model.safetensors`.

`weights.py` loads one safely (read it first), `extract.py` turns any method's result into one, `probe.py` proves that
a folder still does what it was published for, `export.py` merges one into its base.
"""
