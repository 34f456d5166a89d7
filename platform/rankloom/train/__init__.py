"""Training without Ray: `loop.py` is the file to read first, `run.py` the whole way of a trial."""
