"""Pages of other origins: what a browser asks before it calls, and which answers it lets a page read."""

from __future__ import annotations

from pathlib import Path

import pytest

from endpoint import Endpoint, endpoint
from rankloom.config import parse
from rankloom.config.serve import ServeConfig
from rankloom.errors import ConfigError
from rankloom.gateway.keys import KeyFile

PAGE, OTHER = "https://chat.example.com", "https://evil.example.com"
COMPLETE = {"model": "bank", "prompt": "hi"}


def preflight(made: Endpoint, origin: str, method: str = "POST") -> dict[str, str]:
    """Return the headers of the answer to a browser's question, with its status."""
    asked = {"origin": origin, "access-control-request-method": method}
    asked["access-control-request-headers"] = "authorization,content-type,x-stainless-lang"
    answer = made.http.options("/v1/chat/completions", headers=asked)
    return dict(answer.headers) | {"status": str(answer.status_code)}


def test_no_page_may_call_by_default(tmp_path: Path) -> None:
    with endpoint(tmp_path) as made:
        assert not [name for name in preflight(made, PAGE) if name.startswith("access-control")]
        answer = made.post("/v1/completions", COMPLETE, headers={"origin": PAGE})
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_pages_of_listed_origins_may(tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    secret, _ = keys.create("ann")
    with endpoint(tmp_path, auth={"keys": str(keys.path), "cors_origins": [PAGE, "http://localhost:3000"]}) as made:
        for origin in (PAGE, "http://localhost:3000"):
            asked = preflight(made, origin)
            assert (asked["status"], asked["access-control-allow-origin"]) == ("200", origin)
            assert asked["access-control-allow-credentials"] == "true"
            assert "x-stainless-lang" in asked["access-control-allow-headers"]
            headers = {"origin": origin, "authorization": f"Bearer {secret}"}
            answer = made.post("/v1/completions", COMPLETE, headers=headers)
            assert answer.headers["access-control-allow-origin"] == origin
            assert "x-rankloom-version" in answer.headers["access-control-expose-headers"]
            refused = made.post("/v1/completions", COMPLETE, headers={"origin": origin})  # which the page may read
            assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, origin)
        assert "access-control-allow-origin" not in preflight(made, OTHER)
        assert preflight(made, OTHER)["status"] == preflight(made, PAGE, "DELETE")["status"] == "400"
        answer = made.post("/v1/completions", COMPLETE, headers={"origin": OTHER, "authorization": f"Bearer {secret}"})
        assert "access-control-allow-origin" not in answer.headers


def test_every_page_may_but_without_credentials(tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    keys.create("ann")
    with endpoint(tmp_path, auth={"keys": str(keys.path), "cors_origins": "*"}) as made:
        asked = preflight(made, OTHER)
        assert asked["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in asked


def test_they_change_while_it_runs(tmp_path: Path) -> None:
    with endpoint(tmp_path) as made:
        made.gateway.config = parse(ServeConfig, {"base": "org/base", "auth": {"cors_origins": PAGE}})
        assert preflight(made, PAGE)["access-control-allow-origin"] == PAGE


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("*", "cors_origins=\\*: any page could call the endpoint, which has no keys"),
        ("chat.example.com", "auth.cors_origins"),
        ("https://chat.example.com/page", "auth.cors_origins"),
        ("https://*.example.com", "auth.cors_origins"),
    ],
)
def test_what_is_no_origin_is_refused(given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(ServeConfig, {"base": "org/base", "auth": {"cors_origins": given}})
