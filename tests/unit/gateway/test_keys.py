"""API keys: made, found, revoked; never written down; and the meter of what a key may use."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from rankloom.errors import ConfigError
from rankloom.gateway.errors import RateLimitedError
from rankloom.gateway.keys import KeyFile, TokenBucket
from rankloom.gateway.openai.errors import to_wire_error
from rankloom.gateway.quota import Quotas


@pytest.fixture
def file(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "made" / "keys.json")


def test_a_key_is_found_until_it_is_revoked(file: KeyFile) -> None:
    ann, _ = file.create("ann")
    boss, kept = file.create("boss", "admin", requests_per_minute=5, tokens_per_minute=700)
    reader = KeyFile(file.path)
    found = reader.find(boss)
    assert found == kept
    assert found is not None
    assert (found.name, found.role, found.requests_per_minute, found.tokens_per_minute) == ("boss", "admin", 5, 700)
    assert [key.name for key in reader.list()] == ["ann", "boss"]
    file.revoke(kept.id)
    assert reader.find(boss) is None  # in another process, without a restart
    assert getattr(reader.find(ann), "name", None) == "ann"


def test_the_file_holds_no_key_and_is_its_owners(file: KeyFile) -> None:
    key, _ = file.create("ann")
    text = file.path.read_text()
    assert key not in text
    assert key.rpartition("-")[2] not in text
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert [p.name for p in file.path.parent.iterdir() if p.name != file.path.name] == [".keys.json.lock"]


def test_a_wrong_key_is_nobodys(file: KeyFile) -> None:
    key, kept = file.create("ann")
    other, _ = file.create("bob")
    mixed = f"rl-{kept.id}-{other.split('-', 2)[2]}"
    changed = key[:-1] + ("A" if key[-1] != "A" else "B")
    for wrong in (None, "", "x", mixed, changed, key + " ", key.upper(), "rl-" + "0" * 12 + "-" + "A" * 43, "\ud800"):
        assert file.find(wrong) is None


def test_what_cant_be_done_says_why(file: KeyFile, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file of keys; make one with rankloom keys create"):
        file.list()
    with pytest.raises(ConfigError, match="name 'Ann B'"):
        file.create("Ann B")
    with pytest.raises(ConfigError, match="tokens_per_minute 0"):
        file.create("ann", tokens_per_minute=0)
    file.create("ann")
    with pytest.raises(ConfigError, match=r"key 'nope': not in .*ann"):
        file.revoke("nope")
    file.path.write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        file.find("rl-" + "0" * 12 + "-" + "A" * 43)
    (tmp_path / "plain").write_text("")
    with pytest.raises(ConfigError, match="can't be"):
        KeyFile(tmp_path / "plain" / "keys.json").create("ann")


def test_a_meter_fills_in_a_minute() -> None:
    meter = TokenBucket(60)
    for _ in range(60):
        assert meter.wait_s(100.0) == 0
        meter.take(1, 100.0)
    assert meter.wait_s(100.0) == pytest.approx(1)
    assert meter.wait_s(100.5) == pytest.approx(0.5)
    assert meter.wait_s(101.0) == 0
    assert TokenBucket(60).wait_s(0.0) == 0
    meter.take(200, 1000.0)  # known only when it was used: 140 more than there were
    assert meter.wait_s(1000.0) == pytest.approx(141)
    assert meter.wait_s(1141.0) == pytest.approx(0)
    assert meter.wait_s(1e9) == 0


def test_what_a_request_may_generate_is_off_its_keys_minute_while_it_lasts(file: KeyFile) -> None:
    _, key = file.create("thrifty", tokens_per_minute=600)
    quotas = Quotas()
    quotas.admit(key, 0.0)
    quotas.begin(key, 500, 0.0)
    quotas.admit(key, 0.0)
    quotas.begin(key, 4096, 0.0)  # reserves a whole minute, not more
    with pytest.raises(RateLimitedError, match=r"600 tokens a minute reached; try again in 50\.1 s") as caught:
        quotas.admit(key, 0.0)
    error = to_wire_error(caught.value)
    assert (error.status, error.kind, error.make_headers()) == (429, "tokens", {"retry-after": "51"})
    quotas.end(key, 500, 20, 0.0)
    quotas.end(key, 4096, 30, 0.0)  # what was not used is given back
    quotas.admit(key, 0.0)
    quotas.begin(key, 550, 0.0)
    quotas.end(key, 550, 550, 0.0)  # 600 in all
    with pytest.raises(RateLimitedError, match=r"again in 0\.1 s"):
        quotas.admit(key, 0.0)
    quotas.begin(key, 16, 1.0)
    quotas.end(key, 16, 1800, 1.0)
    with pytest.raises(RateLimitedError, match="again in 179"):  # it used three minutes
        quotas.admit(key, 1.0)
