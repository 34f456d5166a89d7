"""Shells that put adapters behind Ray Serve; `app.py` builds the application."""
