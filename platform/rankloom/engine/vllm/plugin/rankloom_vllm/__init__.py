"""rankloom in vLLM's own processes. It runs there, so it knows neither rankloom nor its dependencies.

`register.py` changes vLLM, with `names.py` (which module an adapter means) and `dora.py` (DoRA's arithmetic), which
know nothing of vLLM.
"""
