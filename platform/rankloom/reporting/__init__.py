"""Reports: a trial, a study or a data check as one HTML file that needs no network.

`write.py` is the entry point. `study.py`, `run.py` and `data.py` read what a run left and make a `Page` of the pieces
in `pieces.py`; `charts.py` and `tables.py` make those pieces from the plain trials in `trials.py`, `verdict.py` says
which of two results is better; `html.py` makes the file and `png.py` the pictures. No Ray, and no torch but for the
data's tokenizer.
"""
