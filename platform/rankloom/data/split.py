"""The deterministic split: takes validation and test rows off `data.train` where no other source gives them.

Rows are ranked by a hash of their prompt, so that equal prompts are on the same side, the order of the file does not
matter, and most rows keep their side when the file grows.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

from rankloom.errors import DataError


def split_off(
    prompts: Sequence[str], fractions: Mapping[str, float], seed: int, *, field: str = "data.train"
) -> dict[str, set[str]]:
    """Choose the prompts of each part; the rest stays to train on.

    Args:
        prompts: each row's prompt, or its digest.
        fractions: part -> its share of the rows, taken in this order.

    Returns:
        part -> its prompts; no part is empty, and neither is the rest.

    Raises:
        DataError: there are too few different prompts.
    """
    counts = Counter(prompts)
    needed = len(fractions) + 1
    if len(counts) < needed:
        raise DataError(
            f"{field}: {len(prompts)} row(s) with {len(counts)} different prompt(s) can't be split into train, "
            f"{' and '.join(fractions)}: at least {needed} different prompts are needed; add rows, or give "
            f"{' and '.join(f'data.{part}' for part in fractions)}"
        )
    ranked = sorted(counts, key=lambda prompt: hashlib.sha256(f"{seed}:{prompt}".encode()).digest())
    parts: dict[str, set[str]] = {}
    for i, (part, fraction) in enumerate(fractions.items()):
        wanted = max(1, round(fraction * len(prompts)))
        must_stay = len(fractions) - i  # a prompt for each part to come, and for train
        chosen: list[str] = []
        taken = 0
        for prompt in ranked[: len(ranked) - must_stay]:
            if taken + counts[prompt] <= wanted:
                chosen.append(prompt)
                taken += counts[prompt]
            if taken == wanted:
                break
        if not chosen:  # every prompt has more rows than the part wants
            chosen = [min(ranked, key=lambda prompt: counts[prompt])]
        parts[part] = set(chosen)
        ranked = [prompt for prompt in ranked if prompt not in parts[part]]
    return parts
