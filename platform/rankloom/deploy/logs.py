"""Logs of a deployment: rankloom's own loggers write where Ray Serve's does."""

from __future__ import annotations

import logging

SERVE = "ray.serve"


def log_with_serve(name: str) -> None:
    """Give a logger the handlers and the level of Ray Serve's, whose format and file a deployment sets.

    Call it in the deployment's process, after Serve has set its logger up.
    """
    serve, logger = logging.getLogger(SERVE), logging.getLogger(name)
    logger.handlers = serve.handlers  # the list itself: Serve changes it in place
    logger.setLevel(serve.level)
    logger.propagate = False
