"""The registry: versions of adapters under names, with aliases that move; torch-free.

`record.py` defines what is recorded of a version, `checks.py` what its folder may hold, `storage.py` how its files
become visible atomically on a disk or an object store. Read `store.py` first.
"""

from rankloom.registry.record import BaseModelRef, Draft, Lineage, Record, Versions
from rankloom.registry.store import CHAMPION, Registry, check_name

__all__ = ["CHAMPION", "BaseModelRef", "Draft", "Lineage", "Record", "Registry", "Versions", "check_name"]
