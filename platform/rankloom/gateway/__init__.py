"""What an endpoint decides and remembers between a request and an engine: names, routes, limits, canaries, metrics.

Read `gateway.py` first. It knows neither torch, HTTP nor Ray; `openai/` reads and writes OpenAI's formats.
"""
