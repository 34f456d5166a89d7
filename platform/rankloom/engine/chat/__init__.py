"""What a base's chat template writes beside texts: thinking and calls of tools, read from completions and forced.

`format.py` chooses how for a base; read it first.
"""
