"""The choice of a replica for a request: Ray Serve's hook around `policy.rank_replicas`."""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from rankloom.engine.forward import ForwardJob
from rankloom.engine.jobs import CompletionJob
from rankloom.gateway.policy import rank_replicas


class AdapterRouter(RequestRouter):  # type: ignore[misc]  # Ray has no types
    """Every adapter has a replica where its weights stay, as long as that one is not overloaded."""

    def initialize_state(self, room: int) -> None:
        """
        Args:
            room: requests that a replica works on at once.
        """
        self._room = room

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return one replica a rank, so that the next is asked only where the one before is full."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # where all are full, don't ask without a pause
        # shuffled: several requests on the base, which come before the loads show the first, do not all go to one
        shuffled = random.sample(candidate_replicas, len(candidate_replicas))
        replicas = {replica.replica_id.unique_id: replica for replica in shuffled}
        loads = {name: self.replica_queue_len_cache.get(r.replica_id) or 0 for name, r in replicas.items()}
        return [[replicas[name]] for name in rank_replicas(_read_adapter(pending_request), loads, room=self._room)]


def _read_adapter(request: PendingRequest | None) -> str | None:
    first: Any = request.args[0] if request is not None and request.args else None
    return first.adapter if isinstance(first, CompletionJob | ForwardJob) else first if isinstance(first, str) else None
