"""Launching: start a trial where it runs, and report its events and errors to the user.

`trainer.train_trial` runs a trial in this process or under Ray Train (`ray_session.py` is its worker's side),
`evaluation.evaluate` scores one, `submit.py` sends either to a cluster as a Ray job. The driver watches a call in the
background (`background.py`), whose events come through a `channel.py`; `failures.py` turns whatever
ended it into one readable error.
The training itself is `rankloom.training`'s. Read `trainer.py` first.
"""
