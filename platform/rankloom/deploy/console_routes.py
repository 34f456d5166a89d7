"""The console: its page, what it shows, and an admin's moves of aliases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from rankloom.deploy.callers import check_admin, get_caller, may_see_all
from rankloom.deploy.descriptions import cache_by_catalogue, describe_card, describe_route
from rankloom.deploy.responding import respond_json
from rankloom.errors import RegistryError
from rankloom.gateway.gateway import Gateway
from rankloom.gateway.openai.errors import WireError
from rankloom.gateway.openai.requests import PromoteRequest, RollbackRequest

PAGE = Path(__file__).parent / "console"


class ConsoleRoutes:
    """The page needs no key; what it shows is what the key may see."""

    def __init__(self, get_gateway: Callable[[], Gateway]) -> None:
        self._get_gateway = get_gateway
        self._list_cards = cache_by_catalogue(describe_card)

    def add_to(self, api: FastAPI) -> None:
        api.get("/", include_in_schema=False)(self.page)
        api.get("/console.{kind}", include_in_schema=False)(self.part)
        api.get("/console/state", include_in_schema=False)(self.state)
        api.post("/console/promote", include_in_schema=False)(self.promote)
        api.post("/console/rollback", include_in_schema=False)(self.roll_back)

    async def page(self) -> Response:
        return _read_page("index.html", "text/html")

    async def part(self, kind: Literal["js", "css"]) -> Response:
        return _read_page(f"console.{kind}", {"js": "text/javascript", "css": "text/css"}[kind])

    async def state(self, request: Request) -> Response:
        gateway, is_admin = self._get_gateway(), get_caller(request).admin
        routes = [describe_route(gateway, name, with_counts=is_admin) for name in gateway.catalogue.routes]
        head = {
            "base": gateway.catalogue.public_base,
            "context": gateway.served.context,
            "admin": is_admin,
            "routes": routes,
            **(gateway.metrics.sum_totals() if may_see_all(request) else {}),
            **({"recent": list(gateway.recent)} if is_admin else {}),
        }
        cards = await self._list_cards(gateway)
        return respond_json(json.dumps(head)[:-1].encode() + b', "models": [' + cards + b"]}")

    async def promote(self, request: Request, body: PromoteRequest) -> Response:
        return await self._move_alias(request, body.adapter, body.alias, body.version)

    async def roll_back(self, request: Request, body: RollbackRequest) -> Response:
        return await self._move_alias(request, body.adapter, body.alias, None)

    async def _move_alias(self, request: Request, name: str, alias: str, version: int | None) -> Response:
        check_admin(request)
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            raise WireError(403, "Aliases are moved from the endpoint's own page alone.", code="foreign_origin")
        try:
            target = await self._get_gateway().move_alias(name, alias, version, get_caller(request).key)
        except RegistryError as error:
            raise WireError(409, str(error), code="alias_not_moved") from None
        return JSONResponse({"alias": f"{name}@{alias}", "adapter": target.ref})


def _read_page(name: str, kind: str) -> Response:
    policy = "default-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff", "cache-control": "no-cache"}
    return Response((PAGE / name).read_bytes(), media_type=f"{kind}; charset=utf-8", headers=headers)
