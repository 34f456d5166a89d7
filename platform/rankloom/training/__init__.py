"""Training without Ray: `loop.py` trains one trial (read it first), `run.py` takes it from config to registry.

`fused/` trains many trials on one base. The launcher of a run supplies a `Session` (`session.py`).
"""
