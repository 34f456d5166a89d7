"""Reports: a trial, a study, a comparison or a data check as one HTML file that needs no network.

`write.py` is the entry point. `study.py`, `run.py`, `comparison.py` and `data.py` read what a run left and make a page
of the pieces of `rankloom.pages`; `charts.py` and `tables.py` make those pieces from the plain trials in `trials.py`,
`verdict.py` says which of two results is better. No Ray, and no torch but for the data's tokenizer.
"""
