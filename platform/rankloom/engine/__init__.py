"""The serving engine: requests on many adapters over one base, a step at a time.

Read `core.py` first, `step()` above all. `protocol.py` is what an engine is to its callers, `jobs.py` turns one HTTP
request into engine requests; both import no torch. `vllm/` has the same protocol on vLLM.
"""
