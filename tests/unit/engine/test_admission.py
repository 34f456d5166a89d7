"""Which requests an engine takes: whose they are, and how many."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from rankloom.engine.admission import Admission
from rankloom.engine.protocol import Request, Sampling
from rankloom.errors import OverloadedError


def test_no_tenant_takes_all_places() -> None:
    admission = Admission(64, vocabulary=10)

    def take(stack: ExitStack, number: int, tenant: str | None) -> None:
        request = Request(f"{tenant}-{number}", None, (1,), Sampling(), tenant)
        stack.enter_context(admission.take(request, 8))

    with ExitStack() as anns, ExitStack() as bens:
        for number in range(32):
            take(anns, number, "ann")
        with pytest.raises(OverloadedError, match="32 requests of this key"):
            take(anns, 32, "ann")
        for number in range(16):
            take(bens, number, "ben")
        with pytest.raises(OverloadedError, match="16 requests of this key"):
            take(bens, 16, "ben")
        for number in range(16):
            take(bens, number, None)  # where there are no keys, first come, first served
        with pytest.raises(OverloadedError, match="64 requests are running"):
            take(bens, 16, None)
        anns.close()
        take(bens, 17, "ben")
    assert not admission.open
