"""The gateway's log goes where Ray Serve's goes."""

from __future__ import annotations

import logging

from rankloom.deploy.logs import SERVE, log_with_serve


def test_a_logger_writes_where_serve_does() -> None:
    serve, ours = logging.getLogger(SERVE), logging.getLogger("rankloom.test_logs")
    records: list[logging.LogRecord] = []
    handler, level = logging.Handler(), serve.level
    handler.emit = records.append  # type: ignore[method-assign]
    try:
        serve.setLevel(logging.INFO)
        log_with_serve(ours.name)
        serve.addHandler(handler)  # also one that comes later
        ours.debug("quiet")
        logging.getLogger(f"{ours.name}.module").info("loud")
    finally:
        serve.removeHandler(handler)
        serve.setLevel(level)
    assert [record.getMessage() for record in records] == ["loud"]
