"""Searching over trials with Ray Tune: `study.py` is a study from start to end; read `trainable.py` next.

The driver and the trials here do not import torch. The hosts (`hosts/host_actor.py`), which trials join, compute, and
so do the dedicated runs of methods that can't share a base.
"""
