"""Launching: where a trial runs, and how what happens there reaches the user.

`trainer.fit` runs a trial in this process or under Ray Train, `evaluation.evaluate` scores one, `submit.py` sends
either to a cluster as a Ray job. The training itself is `rankloom.train`'s. Read `trainer.py` first.
"""
