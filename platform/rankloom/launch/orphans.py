"""Placement groups that outlive their run.

Ray Train's controller reserves its workers' cores. Where the process that runs a trial is killed, the controller dies
with it, but Ray keeps what it reserved, or waits to reserve, until the whole job ends. Ray Train's own remedy
(`PlacementGroupCleaner`) needs Ray's dashboard, and knows a group only once its workers run.

Ray's public functions do not say who created a group, so this file reads Ray's tables; Ray's version is pinned.
"""

from __future__ import annotations


def remove_orphaned_groups() -> None:
    """Remove this job's placement groups whose creator, an actor, is dead."""
    import ray
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    job = ray.get_runtime_context().get_job_id()
    for stored in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(stored)
        of_an_actor = group.creator_actor_id and not ray.ActorID(group.creator_actor_id).is_nil()
        if group.creator_job_id.hex() != job or not of_an_actor or group.is_detached:
            continue
        if group.creator_actor_dead and group.state != PlacementGroupTableData.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
