"""vLLM as an engine: `engine.py` has the protocol, `server.py` its process, which `die_with_parent.py` ends."""
