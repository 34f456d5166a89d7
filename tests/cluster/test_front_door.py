"""`import rankloom as rl` on a Ray and a Serve that run already."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import rankloom as rl

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_serve")]


def test_an_endpoint_that_does_not_start_leaves_nothing(tmp_path: Path, tiny_llama: Path) -> None:
    from ray import serve

    base = tmp_path / "broken"
    shutil.copytree(tiny_llama, base)
    (base / "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(rl.RankloomError, match="the endpoint did not start: "):
        rl.serve({"base": str(base), "registry": str(tmp_path), "port": 0})
    assert not serve.status().applications


def test_an_endpoint_with_keys_asks_for_one(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve import context

    from rankloom.gateway.keys import KeyFile

    # what Serve keeps where a process started a Ray, served, ended both, and starts the next Ray
    monkeypatch.setattr(context, "_global_client", object())
    key, _ = KeyFile(tmp_path / "keys.json").create("ann", "user")
    config = rl.ServeConfig(
        base=str(tiny_llama), registry=str(tmp_path), port=0, auth=rl.AuthConfig(keys=str(tmp_path / "keys.json"))
    )
    with rl.serve(config) as endpoint:
        assert [model.id for model in endpoint.client(api_key=key).models.list()] == ["base"]
        with pytest.raises(rl.ConfigError, match=r"give it as client\(api_key="):
            endpoint.client()
        assert "closed" not in repr(endpoint)
    assert repr(endpoint) == f"Endpoint({endpoint.url}, closed)"
    endpoint.close()  # once more does nothing
