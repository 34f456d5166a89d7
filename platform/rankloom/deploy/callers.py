"""Who asks: the caller that `auth.py` found, and what it may see."""

from __future__ import annotations

from fastapi import Request

from rankloom.deploy.auth import Caller
from rankloom.gateway.openai.errors import WireError


def get_caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


def may_see_all(request: Request) -> bool:
    """Return whether the caller may see all traffic, not only that of its own key."""
    caller = get_caller(request)
    return caller.key is None or caller.admin


def check_admin(request: Request) -> None:
    caller = get_caller(request)
    if not caller.admin:
        whose = "needs an admin's key" if caller.key else "is for the endpoint's own machine"
        raise WireError(403, f"This {whose}.", code="admin_required")
