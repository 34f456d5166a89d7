"""Many trials trained together on one base.

Read `host.py` first: its `step()` plans (`plan.py`), computes (`packing.py`) and applies (`optim.py`). `member.py` is
one trial's state, `validation.py` scores members.
"""
