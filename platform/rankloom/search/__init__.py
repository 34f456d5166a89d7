"""Searching over trials with Ray Tune: `study.py` is the whole way of a study; read `trainable.py` next.

The driver and the trials here import no torch: what computes are the hosts (`hosts/host_actor.py`), which trials join,
and the dedicated runs of methods that can't share a base.
"""
