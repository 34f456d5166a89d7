"""What a run will take, before it starts: memory by part, time and cost, from its config alone.

`plan.py` plans a config, `outline.py` opens its model without weights and counts it, `rows.py` finds the sizes of its
rows, `forecast.py` forecasts one method (the sums are `training/memory_plan.py`'s), `speed.py` finds or measures
tokens/s, `recommend.py` chooses a method for a budget, `gate.py` reports three lines before a run and
refuses it, `endpoint.py` does so for an endpoint.
"""
