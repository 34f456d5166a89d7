"""Suites: tasks of lm-eval and Inspect, on an endpoint that serves an adapter.

`evaluate.py` is the front: it finds or starts the endpoint and stores the scores; `libraries.py` calls the libraries.
"""
