"""The import path for Ray Serve: `serve run serve.app:build` in a source tree; see `rankloom.deploy.app`."""

from rankloom.deploy.app import build

__all__ = ["build"]
