"""OpenAI's API as data: `bodies.py` reads a body, `requests.py` has its types, `responses.py` makes the answers."""
