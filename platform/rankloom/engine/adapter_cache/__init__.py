"""Which adapters an engine holds: `cache.py` keeps them, `eviction.py` decides who leaves, `loading.py` reads them.

`load_backoff.py` remembers failures, so that a broken adapter isn't read at every request.
"""
