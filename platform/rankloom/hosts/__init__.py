"""The actors in which a study's trials train together.

`hosts.py` divides the cluster into hosts and assigns trials to them. `host_actor.py` is one host: `slots.py` decides
which members train, `host_loop.py` trains them, `membership.py` stores their snapshots. `training/fused/` computes
their steps.
"""
