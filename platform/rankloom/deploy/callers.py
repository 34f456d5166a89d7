"""The caller that `auth.py` found: what it may see, and what decides where its request goes."""

from __future__ import annotations

from fastapi import Request

from rankloom.deploy.auth import Caller
from rankloom.gateway.gateway import Gateway
from rankloom.gateway.openai.errors import WireError
from rankloom.gateway.policy import RoutingRequest


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


def find_tenant(gateway: Gateway, request: Request) -> str | None:
    """Return whose cached prefixes a request may use; None: everybody's."""
    key = get_caller(request).key
    return None if key is None or gateway.config.auth.share_prefixes else key.id


def make_routing_request(request: Request, id: str, model: str, user: str | None = None) -> RoutingRequest:
    headers = dict(request.headers.items())
    trace = headers.get("x-request-id", "")[:128] or None
    return RoutingRequest(model=model, id=id, user=user, headers=headers, trace=trace)
