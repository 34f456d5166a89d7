"""AdapterBank: K adapters on one frozen base, stacked, so that one forward serves the rows of all of them.

At each target linear a `Site` holds A, B and DoRA magnitudes of every slot in one tensor each. A slot of a lower rank
than the bank's, or one that leaves a site out, is padded with zeros, whose gradients are exactly zero. The bank hooks
itself into the base's linears; outside `routed` the base computes as if it were not there. `grouped.py` has the
products; who is in which slot, and how it is trained or served, is said elsewhere.

Everything that a slot computes depends on its own values alone, so neighbours may come, go and diverge.

Shapes: N tokens of all rows sorted by slot, K slots, R the bank's rank, I in, O out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rankloom.adapters.grouped import Groups, grouped_lora, scale_rows
from rankloom.adapters.weights import PREFIX, _read_config, _read_tensors
from rankloom.config.method import DoraConfig, LoraConfig
from rankloom.errors import IncompatibleError, RegistryError
from rankloom.models import find_target_linears
from rankloom.registry.checks import WEIGHTS


@dataclass(frozen=True)
class SlotSpec:
    """What a slot holds."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Full names of the linears it adapts."""
    rslora: bool = False
    dora: bool = False
    init: Literal["default", "gaussian"] = "default"
    dropout: float = 0.0
    seed: int = 0
    """Of the initial A; the values are those that PEFT draws after `torch.manual_seed(seed)`."""

    @classmethod
    def of(cls, method: LoraConfig | DoraConfig, model: PreTrainedModel, seed: int) -> SlotSpec:
        if method.init not in ("default", "gaussian"):
            raise IncompatibleError(f"method.init: {method.init!r} changes the base, which others share; use default")
        return cls(
            rank=method.rank,
            alpha=method.alpha,
            targets=tuple(find_target_linears(model, method.target_modules)),
            rslora=method.rslora,
            dora=isinstance(method, DoraConfig),
            init="gaussian" if method.init == "gaussian" else "default",
            dropout=method.dropout,
            seed=seed,
        )

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Site:
    """One target linear with the adapters of all slots."""

    def __init__(self, module: nn.Module, num_slots: int, max_rank: int, *, with_magnitudes: bool) -> None:
        self.module = module
        if isinstance(module, Conv1D):
            self.num_in, self.num_out = module.weight.shape
        else:
            self.num_in, self.num_out = int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
        device = module.weight.device
        self.a_KRI = nn.Parameter(torch.zeros(num_slots, max_rank, self.num_in, device=device))
        self.b_KOR = nn.Parameter(torch.zeros(num_slots, self.num_out, max_rank, device=device))
        self.m_KO = nn.Parameter(torch.zeros(num_slots, self.num_out, device=device)) if with_magnitudes else None
        self.ranks = [0] * num_slots
        """0: the slot leaves this site as it is."""
        self.dora_ranks = [0] * num_slots
        self.scales = [0.0] * num_slots
        self._squares_O: Tensor | None = None

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.module.bias  # type: ignore[assignment]
        return bias

    def dense(self) -> Tensor:
        """[O, I]: the base's weight in fp32, dequantised where it is quantised."""
        weight: Tensor = dequantize_module_weight(self.module)
        return (weight.T if isinstance(self.module, Conv1D) else weight).detach().float()

    def norms(self, slots: Sequence[int]) -> Tensor:
        """[C, O]: the norm of each row of W + s B A, which is not materialised.

        |w + s Δ|² = |w|² + 2 s <w, Δ> + s² |Δ|², with Δ = B A: <w, Δ> is the row product of B and W Aᵀ, and |Δ|²
        that of B and B (A Aᵀ).
        """
        rank = max(self.dora_ranks[slot] for slot in slots)
        weight_OI = self.dense()
        if self._squares_O is None:
            self._squares_O = weight_OI.square().sum(1)
        a_CRI = self.a_KRI.detach()[list(slots), :rank]
        b_COR = self.b_KOR.detach()[list(slots), :, :rank]
        scale_C1 = torch.tensor([self.scales[slot] for slot in slots], device=a_CRI.device)[:, None]
        cross_COR = (weight_OI @ a_CRI.flatten(0, 1).T).view(-1, len(slots), rank).transpose(0, 1)
        crossed_CO = (cross_COR * b_COR).sum(-1)
        own_CO = (torch.bmm(b_COR, torch.bmm(a_CRI, a_CRI.mT)) * b_COR).sum(-1)
        squares_CO = self._squares_O + 2 * scale_C1 * crossed_CO + scale_C1.square() * own_CO
        return squares_CO.clamp_min_(0).sqrt_()


@dataclass(frozen=True)
class _Route:
    """What one forward needs to know of its rows."""

    counts: tuple[int, ...]
    start: int
    """Tokens of no slot, which come first."""
    generators: dict[int, torch.Generator]
    """Of the slots whose dropout is on."""
    groups: dict[tuple[int, ...], Groups]
    """By the slots' ranks at a site: most sites share one."""

    def among(self, ranks: Sequence[int]) -> Groups:
        key = tuple(ranks)
        if key not in self.groups:
            self.groups[key] = Groups(self.counts, key, start=self.start)
        return self.groups[key]


class AdapterBank:
    """Slots for adapters on a frozen base.

    Invariant: a slot's values are zero wherever its adapter has none: beyond its rank, at sites that it leaves out,
    and everywhere once it is detached. Nothing is reallocated after construction.
    """

    def __init__(
        self, model: PreTrainedModel, targets: Sequence[str], num_slots: int, max_rank: int, *, with_magnitudes: bool
    ) -> None:
        """Hook an empty bank into a model's linears.

        Args:
            targets: full names of all linears that some slot may adapt.
            with_magnitudes: whether slots may be DoRA.
        """
        self.model, self.num_slots, self.max_rank = model, num_slots, max_rank
        modules = dict(model.named_modules())
        wanted = set(targets)
        # in the model's order, in which PEFT draws
        self.sites = {
            name: Site(module, num_slots, max_rank, with_magnitudes=with_magnitudes)
            for name, module in modules.items()
            if name in wanted
        }
        self.specs: dict[int, SlotSpec] = {}
        self._route: _Route | None = None
        self._handles: list[RemovableHandle] = [
            site.module.register_forward_hook(self._hook(site)) for site in self.sites.values()
        ]

    def remove(self) -> None:
        """Leave the model as it was before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def attach(self, slot: int, spec: SlotSpec) -> None:
        """Put a fresh adapter into a slot."""
        self.detach(slot)
        self._assign(slot, spec)
        generator = torch.Generator().manual_seed(spec.seed)
        for name, site in self.sites.items():
            if name in spec.targets:
                a_RI = _drawn_as_by_peft(spec, site.num_in, site.num_out, generator)
                site.a_KRI.data[slot, : spec.rank] = a_RI.to(site.a_KRI.device)
                if spec.dora and site.m_KO is not None:
                    site.m_KO.data[slot] = site.norms([slot])[0]

    @torch.no_grad()
    def detach(self, slot: int) -> None:
        """Empty a slot."""
        self.specs.pop(slot, None)
        for site in self.sites.values():
            site.a_KRI.data[slot].zero_()
            site.b_KOR.data[slot].zero_()
            if site.m_KO is not None:
                site.m_KO.data[slot].zero_()
            site.ranks[slot] = site.dora_ranks[slot] = 0
            site.scales[slot] = 0.0

    @contextmanager
    def routed(
        self, slots_N: Tensor, counts_K: Sequence[int], *, dropout_seeds: Mapping[int, int] | None = None
    ) -> Iterator[None]:
        """While it lasts, the model's linears add to each token what its slot has for it.

        Args:
            slots_N: each token's slot, ascending; -1: none.
            counts_K: tokens of each slot.
            dropout_seeds: a slot's seed of this pass, for the slots whose dropout is to act.
        """
        generators = {}
        for slot, seed in (dropout_seeds or {}).items():
            if slot in self.specs and self.specs[slot].dropout:
                generators[slot] = torch.Generator(slots_N.device).manual_seed(seed)
        counts = tuple(int(count) for count in counts_K)
        self._route = _Route(counts, len(slots_N) - sum(counts), generators, {})
        try:
            yield
        finally:
            self._route = None

    def state(self, slot: int) -> dict[str, Tensor]:
        """A slot's values, without padding, by site."""
        spec, found = self.specs[slot], {}
        for name in spec.targets:
            site = self.sites[name]
            found[f"{name}.a"] = site.a_KRI.detach()[slot, : spec.rank].cpu().clone()
            found[f"{name}.b"] = site.b_KOR.detach()[slot, :, : spec.rank].cpu().clone()
            if spec.dora and site.m_KO is not None:
                found[f"{name}.m"] = site.m_KO.detach()[slot].cpu().clone()
        return found

    @torch.no_grad()
    def load_state(self, slot: int, state: Mapping[str, Tensor]) -> None:
        """Set an attached slot's values."""
        spec = self.specs[slot]
        for name in spec.targets:
            site = self.sites[name]
            site.a_KRI.data[slot, : spec.rank] = state[f"{name}.a"].to(site.a_KRI.device)
            site.b_KOR.data[slot, :, : spec.rank] = state[f"{name}.b"].to(site.b_KOR.device)
            if spec.dora and site.m_KO is not None:
                site.m_KO.data[slot] = state[f"{name}.m"].to(site.m_KO.device)

    @torch.no_grad()
    def copy(self, source: int, target: int) -> None:
        """Give a slot another's values."""
        self.load_state(target, self.state(source))

    def write(self, slot: int, folder: Path, base_id: str) -> None:
        """Write a slot's adapter as a PEFT folder."""
        spec = self.specs[slot]
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=spec.rank,
            lora_alpha=spec.alpha,
            lora_dropout=spec.dropout,
            use_rslora=spec.rslora,
            use_dora=spec.dora,
            init_lora_weights=True if spec.init == "default" else spec.init,
            target_modules=self._short(spec.targets),
            fan_in_fan_out=any(isinstance(self.sites[name].module, Conv1D) for name in spec.targets),
            inference_mode=True,
            base_model_name_or_path=base_id,
        )
        suffixes = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}
        tensors = {}
        for key, value in self.state(slot).items():
            name, part = key.rsplit(".", 1)
            tensors[f"{PREFIX}{name}.{suffixes[part]}"] = value.contiguous()
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    def _short(self, targets: Sequence[str]) -> list[str]:
        """Last names (`q_proj`) where these mean the same, else full names."""
        short = {name.rsplit(".", 1)[-1] for name in targets}
        matched = {name for name, _ in self.model.named_modules() if name.rsplit(".", 1)[-1] in short}
        return sorted(short) if matched == set(targets) else list(targets)

    def _assign(self, slot: int, spec: SlotSpec) -> None:
        self.specs[slot] = spec
        for name, site in self.sites.items():
            if name in spec.targets:
                site.ranks[slot] = spec.rank
                site.dora_ranks[slot] = spec.rank if spec.dora else 0
                site.scales[slot] = spec.scaling

    def _hook(self, site: Site) -> Any:
        def adapt(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return None if self._route is None else self._adapted(site, self._route, args[0], output)

        return adapt

    def _adapted(self, site: Site, route: _Route, x: Tensor, output: Tensor) -> Tensor:
        groups = route.among(site.ranks)
        if not groups.slots:
            return output
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else site.a_KRI.dtype
        a_KRI, b_KOR = site.a_KRI.to(dtype), site.b_KOR.to(dtype)
        output = grouped_lora(x.to(dtype), a_KRI, b_KOR, site.scales, groups, onto=output.contiguous())
        magnified = route.among(site.dora_ranks)
        if magnified.slots and site.m_KO is not None:
            with torch.no_grad(), torch.autocast(kind, enabled=False):
                norm_KO = torch.ones_like(site.m_KO)
                norm_KO[list(magnified.slots)] = site.norms(magnified.slots)
            output = scale_rows(output, site.m_KO / norm_KO, site.bias, magnified)
        return output


def _drawn_as_by_peft(spec: SlotSpec, num_in: int, num_out: int, generator: torch.Generator) -> Tensor:
    """[R, I]: PEFT builds two linear layers, each of which draws its weights, and then draws A again."""
    a_RI = torch.empty(spec.rank, num_in)
    nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5), generator=generator)
    nn.init.kaiming_uniform_(torch.empty(num_out, spec.rank), a=math.sqrt(5), generator=generator)
    if spec.init == "gaussian":
        return nn.init.normal_(a_RI, std=1 / spec.rank, generator=generator)
    return nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5), generator=generator)


__all__ = ["AdapterBank", "RegistryError", "Site", "SlotSpec", "_read_config", "_read_tensors"]
