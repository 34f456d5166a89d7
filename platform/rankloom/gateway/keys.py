"""API keys: a file of hashes, each key's owner, and its limits.

A key is shown once, when it is made. The file has only SHA-256 of it: a key is 256 random bits, so that a slow hash
would add nothing (a password needs one). Comparing takes the same time whatever is wrong.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import filelock
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from rankloom.config.trial import Name
from rankloom.errors import ConfigError

Role = Literal["user", "admin"]
LOCK_TIMEOUT_S = 10
_KEY = re.compile(r"rl-([0-9a-f]{12})-([A-Za-z0-9_-]{43})")
_NO_KEY = hashlib.sha256(b"").hexdigest()


class Key(BaseModel):
    """The record of a key, without the key itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{12}$")]
    """Its public part, which logs may have."""
    name: Name
    """Its owner."""
    role: Role
    """admin: may also load, unload and promote adapters, and see all traffic."""
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None
    """Tokens of prompts and completions together."""
    created: AwareDatetime


_Keys = TypeAdapter(tuple[Key, ...])


class KeyFile:
    """The keys in one file, read again when it changes. Safe for several processes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._read: tuple[tuple[int, int, int], dict[str, Key]] | None = None

    def create(
        self,
        name: str,
        role: Role = "user",
        *,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
    ) -> tuple[str, Key]:
        """Create a key. Returns it, which is not possible again, and its record.

        Raises:
            ConfigError: the file can't be used, or the name or a limit is none.
        """
        public, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        key = f"rl-{public}-{secret}"
        fields = {"requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute}
        try:
            kept = Key(id=public, name=name, role=role, sha256=_hash(key), created=datetime.now(UTC), **fields)
        except ValidationError as error:
            detail = error.errors()[0]
            raise ConfigError(f"{'.'.join(map(str, detail['loc']))} {detail['input']!r}: {detail['msg']}") from None
        with self._edit() as keys:
            self._write([*keys, kept])
        return key, kept

    def revoke(self, key_id: str) -> Key:
        """Revoke a key by its id. Raises ConfigError where there is none."""
        with self._edit() as keys:
            found = next((key for key in keys if key.id == key_id), None)
            if found is None:
                known = ", ".join(f"{key.id} ({key.name})" for key in keys) or "none"
                raise ConfigError(f"key {key_id[:80]!r}: not in {self.path}; it holds {known}")
            self._write([key for key in keys if key.id != key_id])
        return found

    def list(self) -> Sequence[Key]:
        """List all keys, oldest first. Raises ConfigError where the file can't be read."""
        return tuple(self._load().values())

    def find(self, key: str | None) -> Key | None:
        """Return the record of a key; None for a missing, wrong or revoked one."""
        parts = _KEY.fullmatch(key or "")
        known = self._load().get(parts[1]) if parts else None
        same = hmac.compare_digest(_hash(key or ""), known.sha256 if known else _NO_KEY)
        return known if same else None

    def _load(self) -> dict[str, Key]:
        try:
            state = self.path.stat()
            stamp = (state.st_mtime_ns, state.st_size, state.st_ino)
            if self._read is None or self._read[0] != stamp:
                keys = _Keys.validate_json(self.path.read_bytes())
                self._read = stamp, {key.id: key for key in keys}
            return self._read[1]
        except FileNotFoundError:
            raise ConfigError(f"{self.path}: no such file of keys; make one with rankloom keys create") from None
        except ValidationError:
            raise ConfigError(f"{self.path}: damaged, or no file of keys; restore it") from None
        except OSError as error:
            raise ConfigError(f"{self.path}: can't be read: {error.strerror}") from None

    @contextmanager
    def _edit(self) -> Iterator[Sequence[Key]]:
        """Yield the keys while holding the file's lock."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with filelock.FileLock(self.path.with_name(f".{self.path.name}.lock"), timeout=LOCK_TIMEOUT_S):
                yield self.list() if self.path.exists() else ()
        except filelock.Timeout:
            raise ConfigError(f"{self.path}: another process has held its lock for {LOCK_TIMEOUT_S} s") from None
        except OSError as error:
            raise ConfigError(f"{self.path}: can't be written: {error.strerror}") from None

    def _write(self, keys: Sequence[Key]) -> None:
        staged = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        try:
            with os.fdopen(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
                opened.write(_Keys.dump_json(tuple(keys), indent=2) + b"\n")
                opened.flush()
                os.fsync(opened.fileno())
            staged.replace(self.path)
        finally:
            staged.unlink(missing_ok=True)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


class TokenBucket:
    """The amount of a resource that a key has left: a bucket that fills in a minute.

    What a request costs in tokens is known when it ends, so that the bucket may go below empty; it is then the next one
    that waits. While it lasts, what it may generate is taken off (`quota.py`), so that only one can overdraw.
    """

    def __init__(self, per_minute: int) -> None:
        self._rate = per_minute / 60
        self._size = float(per_minute)
        self._level = self._size
        self._at = 0.0

    def wait_s(self, now: float) -> float:
        """Return the seconds until at least one is available; 0: now.

        Args:
            now: in seconds of a monotonic clock.
        """
        return max(0.0, (1.0 - self._count_tokens(now)) / self._rate)

    def take(self, amount: float, now: float) -> None:
        """Remove `amount` from the bucket."""
        self._level, self._at = self._count_tokens(now) - amount, now

    def _count_tokens(self, now: float) -> float:
        return min(self._size, self._level + (now - self._at) * self._rate)
