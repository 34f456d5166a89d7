"""Launching: where a trial runs, and how what happens there reaches the user.

`trainer.train_trial` runs a trial in this process or under Ray Train (`ray_session.py` is its worker's side),
`evaluation.evaluate` scores one, `submit.py` sends either to a cluster as a Ray job. The driver watches a call in the
background (`background.py`), whose events come through a `channel.py`; `failures.py` makes one readable error of
whatever ended it.
The training itself is `rankloom.training`'s. Read `trainer.py` first.
"""
