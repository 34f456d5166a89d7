"""A and B of served adapters as 16-bit integers, with a scale for each rank: half of the bytes to read for every token.

Of a normal row, an integer is within 7e-5 of the row's mean magnitude, where bf16 would be within 2e-3. Whether that is
little enough is for the adapter's probe to say: see `engine/adapter_cache/loading.py`.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from rankloom.banks.served_adapter import Factors, ServedAdapter

PEAK = 16
"""The largest number of a row, over their mean, that becomes an integer: all are then within 2.5e-4 of that mean."""
_LARGEST, _TINY = torch.iinfo(torch.int16).max, torch.finfo(torch.float32).tiny


def round_adapter(adapter: ServedAdapter) -> ServedAdapter:
    """Return it with integers. Linears with a peak, or what is no number, stay: the rest of that row would be lost."""
    return replace(adapter, linears={name: _round(own) for name, own in adapter.linears.items()})


def _round(factors: Factors) -> Factors:
    a_RI, b_RO = factors.a_RI.float(), factors.b_RO.float()
    sizes = [rows.abs() for rows in (a_RI, b_RO)]
    scales = [size.amax(1, keepdim=True).div_(_LARGEST) for size in sizes]
    a_scale_R1, b_scale_R1 = (scale_R1.where(scale_R1 > 0, 1) for scale_R1 in scales)
    scale_R = (a_scale_R1 * b_scale_R1)[:, 0]
    is_even = all((size.amax(1) <= PEAK * size.mean(1)).all() for size in sizes)
    if not (is_even and scale_R.isfinite().all() and (scale_R > _TINY).all()):
        return factors
    a_RI, b_RO = (a_RI / a_scale_R1).round_().short(), (b_RO / b_scale_R1).round_().short()
    return replace(factors, a_RI=a_RI, b_RO=b_RO, scale_R=scale_R)
