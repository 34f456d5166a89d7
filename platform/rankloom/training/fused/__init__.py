"""Many trials trained together on one base.

Read `host.py` first: its `step()` plans (`plan.py`), computes (`packing.py`, `forward.py`) and applies (`optim.py`).
`member.py` is one trial's state, `evaluation.py` scores members.
"""
