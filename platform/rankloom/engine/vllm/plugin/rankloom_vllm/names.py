"""Match the names in an adapter to vLLM's modules."""

from __future__ import annotations

from collections.abc import Collection, Iterable

WRAPPERS = frozenset({"base_model", "model", "language_model", "text_model", "transformer"})
"""Parts of names before a language model's layers. Checkpoints, transformers and vLLM differ in its order and number:
`model.language_model.layers.0` and `language_model.model.layers.0` are one layer, and not `vision_tower.layers.0`."""


def match_modules(adapted: Iterable[str], known: Iterable[str], elsewhere: Collection[str] = ()) -> dict[str, str]:
    """Return the known module of each adapted one that there is.

    Args:
        adapted: modules that an adapter has weights of.
        known: modules that can have adapters.
        elsewhere: beginnings of modules that another process holds; what is below them is left out.

    Raises:
        ValueError: names those that there are not, that several known ones could be, or of which two are one.
    """
    known = set(known)
    by_tail: dict[str, list[str]] = {}
    for name in known:
        by_tail.setdefault(_strip(name), []).append(name)
    away = tuple(f"{_strip(name)}." for name in elsewhere)
    found: dict[str, str] = {}
    unknown: list[str] = []
    for name in adapted:
        candidates = [name] if name in known else by_tail.get(_strip(name), [])
        if len(candidates) == 1:
            found[name] = candidates[0]
        elif not f"{_strip(name)}.".startswith(away):
            unknown.append(name)
    if unknown:
        some = "none of them" if not found else f"{len(found)} others"
        raise ValueError(
            f"the model has no place for {len(unknown)} of the adapter's modules ({some} applied): {_list(unknown)}; "
            f"it can adapt {_list(known)}"
        )
    if len(set(found.values())) < len(found):
        twice = [name for name, module in found.items() if list(found.values()).count(module) > 1]
        raise ValueError(f"the adapter adapts a module under two names: {_list(twice)}")
    return found


def _strip(name: str) -> str:
    """Return a name without the wrappers that it begins with."""
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in WRAPPERS:
        del parts[0]
    return ".".join(parts)


def _list(names: Collection[str], most: int = 6) -> str:
    shown = sorted(names)[:most]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")
