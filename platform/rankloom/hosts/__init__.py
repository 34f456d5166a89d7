"""The actors in which a study's trials train together.

`hosts.py` divides the cluster into hosts and puts trials into them. `host_actor.py` is one host: `slots.py` decides
which members train, `host_loop.py` trains them, `membership.py` keeps their snapshots. How members train together is
in `training/fused/`.
"""
