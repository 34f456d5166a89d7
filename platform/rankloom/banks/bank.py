"""AdapterBank: K adapters on one frozen base, stacked, so that one forward computes the rows of all of them.

At each target linear an `AdaptedLinear` holds A, B and the DoRA magnitudes of all slots, in one tensor each. A slot
with a lower rank than the bank's, or with fewer target linears, is padded with zeros, whose gradients are exactly
zero. The bank replaces its linears' `forward`; outside `apply_route` and `use_slot` the base computes as without a
bank. The bank knows neither the trials in its slots nor how they are trained.

A slot's results depend on its own values alone, so that neighbours may be attached, detached and diverge.

Shapes: N tokens of all rows sorted by slot, K slots, C active slots, R rank, I in, O out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rankloom import kernels
from rankloom.adapters.patterns import compute_lora_scaling
from rankloom.banks.adapted_linear import AdaptedLinear, SlotSpec, TokenRouting, apply_adapters, draw_like_peft
from rankloom.banks.groups import RANK_STEP
from rankloom.banks.ragged import SlotNoise
from rankloom.errors import IncompatibleError, RegistryError
from rankloom.kernels.ragged import ragged_bounds
from rankloom.models import is_linear
from rankloom.registry.checks import CONFIG, PREFIX, WEIGHTS

__all__ = ["AdaptedLinear", "AdapterBank", "SlotSpec"]

SUFFIXES = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}
"""Suffixes of the tensors' names in a PEFT folder."""


class AdapterBank:
    """Slots for adapters on a frozen base.

    Invariant: a slot's values are zero wherever its adapter has none: beyond its rank, at sites that it does not
    adapt, and everywhere while nothing is attached. The constructor allocates all slots; `attach` allocates nothing.
    """

    def __init__(
        self, model: PreTrainedModel, targets: Sequence[str], num_slots: int, max_rank: int, *, with_magnitudes: bool
    ) -> None:
        """Put an empty bank on a model's linears.

        Args:
            targets: full names of all linears that a slot may adapt.
            with_magnitudes: whether slots may be DoRA.

        Raises:
            IncompatibleError: a target is not a linear layer of the model.
        """
        self.model, self.num_slots, self.max_rank = model, num_slots, max_rank
        self.with_magnitudes = with_magnitudes
        modules = dict(model.named_modules())
        for name in targets:
            if name not in modules or not is_linear(modules[name]):
                raise IncompatibleError(f"targets: {name} is not a linear layer of this {type(model).__name__}")
        wanted = set(targets)
        fast = model.dtype if kernels.use_on(model.device) and model.dtype in kernels.FAST_DTYPES else None
        stored_rank = max_rank if fast is None else -(-max_rank // RANK_STEP) * RANK_STEP
        self.sites: dict[str, AdaptedLinear] = {
            name: AdaptedLinear(name, module, num_slots, stored_rank, with_magnitudes=with_magnitudes, fast=fast)
            for name, module in modules.items()  # in the model's order, in which PEFT draws initial values
            if name in wanted
        }
        self.specs: dict[int, SlotSpec] = {}
        self._route: Callable[[int], TokenRouting] | None = None
        """Return the routing of a forward, given its number of tokens; None outside `apply_route` and `use_slot`."""
        self._forwards = {name: vars(site.module).get("forward") for name, site in self.sites.items()}
        for site in self.sites.values():
            site.module.forward = self._make_forward(site)

    def remove(self) -> None:
        """Restore the model's own forwards."""
        for name, before in self._forwards.items():
            module = self.sites[name].module
            if before is None:
                vars(module).pop("forward", None)
            else:
                module.forward = before
        self._forwards.clear()

    def attach(self, slot: int, spec: SlotSpec) -> None:
        """Put a fresh adapter into a slot, replacing the one in it.

        Raises:
            IncompatibleError: the adapter does not fit this bank; the slot is unchanged.
        """
        self._check(spec)
        self.detach(slot)
        self.specs[slot] = spec
        generator = torch.Generator().manual_seed(spec.seed)
        for site in self._list_sites(spec):
            site.assign(slot, spec.rank, spec.scaling, dora=spec.dora)
            parts = site.get_parts(slot)
            parts["a"].copy_(draw_like_peft(spec, site.num_in, site.num_out, generator))
            if "m" in parts:  # B is zero, so that W + s B A is W
                parts["m"].copy_(site.squares_O.masked_fill(site.squares_O == 0, 1).sqrt())
            site.update_shadows(slot)

    def detach(self, slot: int) -> None:
        """Empty a slot."""
        self.specs.pop(slot, None)
        for site in self.sites.values():
            site.clear(slot)

    @contextmanager
    def apply_route(
        self,
        slots_N: Tensor,
        counts_K: Sequence[int],
        *,
        dropout_seeds: Mapping[int, int] | None = None,
        noise: tuple[Tensor, Tensor] | None = None,
    ) -> Iterator[None]:
        """Apply each token's adapter in the model's forwards inside the context.

        Args:
            slots_N: each token's slot, ascending; -1: no adapter, the base alone.
            counts_K: number of tokens of each slot.
            dropout_seeds: slot -> seed of its dropout in this forward; slots without a seed have no dropout.
            noise: for the fast path, `make_dropout_arrays` on the device; None: they are made of `dropout_seeds`.
        """
        counts_K = tuple(map(int, counts_K))
        dropout = {
            slot: (self.specs[slot].dropout, torch.Generator(slots_N.device).manual_seed(seed))
            for slot, seed in (dropout_seeds or {}).items()
            if slot in self.specs and self.specs[slot].dropout
        }
        start, bounds = len(slots_N) - sum(counts_K), self._make_bounds(slots_N)
        if dropout and bounds is not None and noise is None:
            seed_K, rate_K = map(torch.from_numpy, self.make_dropout_arrays(dropout_seeds or {}).values())
            noise = seed_K.to(slots_N.device), rate_K.to(slots_N.device)
        slot_noise = None if noise is None else SlotNoise(*noise, self.has_dropout_in_dora)
        route = TokenRouting(counts_K, start, dropout, {}, bounds, slot_noise)
        with self._use_route(lambda _: route):
            yield

    @contextmanager
    def use_slot(self, slot: int) -> Iterator[None]:
        """Apply one slot's adapter to all tokens of any forward inside the context."""

        @lru_cache(1)
        def route(num_tokens: int) -> TokenRouting:
            counts_K = tuple(num_tokens * (k == slot) for k in range(self.num_slots))
            slots_N = torch.full((num_tokens,), slot, device=self.model.device)
            return TokenRouting(counts_K, 0, {}, {}, self._make_bounds(slots_N))

        with self._use_route(route):
            yield

    def _make_bounds(self, slots_N: Tensor) -> Tensor | None:
        return ragged_bounds(slots_N, self.num_slots) if kernels.use_on(slots_N.device) else None

    def make_dropout_arrays(self, seeds: Mapping[int, int]) -> dict[str, np.ndarray]:
        """Return each slot's seed and rate, `seed_K` and `rate_K`, for `apply_route`; {} where no adapter has dropout.

        Args:
            seeds: slot -> seed of its dropout in a forward; slots without a seed have no dropout.
        """
        if not any(spec.dropout for spec in self.specs.values()):
            return {}
        slots = range(self.num_slots)
        rates = [self.specs[k].dropout if k in seeds and k in self.specs else 0 for k in slots]
        return {
            "seed_K": np.array([seeds.get(k, 0) % 2**31 for k in slots], dtype=np.int32),
            "rate_K": np.array(rates, dtype=np.float32),
        }

    @property
    def has_dropout_in_dora(self) -> bool:
        """Whether any slot is DoRA with dropout."""
        return any(spec.dora and spec.dropout > 0 for spec in self.specs.values())

    @contextmanager
    def _use_route(self, route: Callable[[int], TokenRouting]) -> Iterator[None]:
        self._route = route
        try:
            yield
        finally:
            self._route = None

    def get_views(self, slot: int) -> dict[str, Tensor]:
        """Return views of a slot's values without padding: `<site>.a`, `<site>.b` and, for DoRA, `<site>.m`."""
        return {
            f"{site.name}.{part}": values
            for site in self._list_sites(self.specs[slot])
            for part, values in site.get_parts(slot).items()
        }

    def get_state(self, slot: int) -> dict[str, Tensor]:
        """Return copies of a slot's `get_views` on the CPU."""
        return {name: values.to("cpu", copy=True) for name, values in self.get_views(slot).items()}

    def load_state(self, slot: int, state: Mapping[str, Tensor]) -> None:
        """Set an attached slot's values from what `get_state` returned."""
        for site in self._list_sites(self.specs[slot]):
            for part, values in site.get_parts(slot).items():
                values.copy_(state[f"{site.name}.{part}"])
            site.update_shadows(slot)

    def copy(self, source: int, target: int) -> None:
        """Copy values between attached slots of one shape; the target keeps its scaling and dropout.

        Raises:
            IncompatibleError: the slots' ranks, targets or kinds (LoRA, DoRA) differ.
        """
        mine, theirs = self.specs[target], self.specs[source]
        shapes = [(set(spec.targets), spec.rank, spec.dora) for spec in (mine, theirs)]
        if shapes[0] != shapes[1]:
            raise IncompatibleError(f"slot {source} holds {theirs}, which can't be copied onto slot {target}: {mine}")
        for site in self._list_sites(theirs):
            for part, values in site.get_parts(source).items():
                site.get_parts(target)[part].copy_(values)
            site.update_shadows(target)

    def write(self, slot: int, folder: Path, base_id: str, state: Mapping[str, Tensor] | None = None) -> None:
        """Write a slot's adapter as a PEFT folder, without padding.

        Args:
            state: the slot's `get_state`, where the caller has it.

        Raises:
            RegistryError: the folder can't be written.
        """
        spec, sites = self.specs[slot], self._list_sites(self.specs[slot])
        others = [site for site in sites if site.ranks[slot] != spec.rank or site.scales[slot] != spec.scaling]
        config = {  # PEFT's own format without defaults; importing PEFT for it would take seconds
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_id,
            "r": spec.rank,
            "lora_alpha": spec.alpha,
            "lora_dropout": spec.dropout,
            "use_rslora": spec.rslora,
            "use_dora": spec.dora,
            "bias": "none",
            "init_lora_weights": True if spec.init == "default" else spec.init,
            "target_modules": self._shorten(spec.targets),
            "rank_pattern": {site.name: site.ranks[slot] for site in others},
            "alpha_pattern": {
                site.name: _compute_alpha(site.scales[slot], site.ranks[slot], spec.rslora) for site in others
            },
            "fan_in_fan_out": any(isinstance(site.module, Conv1D) for site in sites),
            "inference_mode": True,
        }
        tensors = {}
        for key, values in (self.get_state(slot) if state is None else state).items():
            name, part = key.rsplit(".", 1)
            tensors[f"{PREFIX}{name}.{SUFFIXES[part]}"] = values.contiguous()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise RegistryError(f"{folder}: can't be written: {error}") from None

    def read(self, slot: int, folder: Path) -> None:
        """Load the adapter of a PEFT folder into a slot, replacing the one in it.

        Raises:
            RegistryError: the folder is not a valid adapter, or does not fit this bank; the slot is unchanged.
        """
        from rankloom.adapters.weights import read_adapter  # imports PEFT, which training never needs

        config, tensors = read_adapter(self.model, folder)
        if config.lora_bias or config.modules_to_save or config.target_parameters:
            raise RegistryError(
                f"{folder}: a bank holds adapters of linear layers alone, without biases, whole modules or experts"
            )
        ends = tuple(f".{target}" for target in config.target_modules)
        names = [name for name, _ in self.model.named_modules() if f".{name}".endswith(ends)]
        if outside := [name for name in names if name not in self.sites]:
            raise RegistryError(f"{folder}: adapts {outside[0]}, which is not a site of this bank")
        spec = SlotSpec(
            rank=config.r,
            alpha=config.lora_alpha,
            rslora=config.use_rslora,
            dora=config.use_dora,
            dropout=config.lora_dropout,
            targets=tuple(names),
        )
        ranks = {name: config.rank_pattern.get(name, config.r) for name in names}
        alphas = {name: config.alpha_pattern.get(name, config.lora_alpha) for name in names}
        try:
            self._check(replace(spec, rank=max(ranks.values())))
        except IncompatibleError as error:
            raise RegistryError(f"{folder}: {error}") from None
        self._check_tensors(spec, ranks, tensors, folder)
        self.detach(slot)
        self.specs[slot] = spec
        for site in self._list_sites(spec):
            rank = ranks[site.name]
            site.assign(slot, rank, compute_lora_scaling(alphas[site.name], rank, spec.rslora), dora=spec.dora)
            for part, values in site.get_parts(slot).items():
                values.copy_(tensors[f"{PREFIX}{site.name}.{SUFFIXES[part]}"])
            site.update_shadows(slot)

    def _list_sites(self, spec: SlotSpec) -> list[AdaptedLinear]:
        targets = set(spec.targets)
        return [site for name, site in self.sites.items() if name in targets]

    def _check(self, spec: SlotSpec) -> None:
        if spec.rank > self.max_rank:
            raise IncompatibleError(f"rank {spec.rank} is above the bank's {self.max_rank}; open one of a higher rank")
        if outside := [name for name in spec.targets if name not in self.sites]:
            raise IncompatibleError(f"{outside[0]} is not a site of this bank; open one with targets that cover it")
        if spec.dora and not self.with_magnitudes:
            raise IncompatibleError("this bank has no magnitudes, which DoRA trains; open one with them")

    def _check_tensors(
        self, spec: SlotSpec, ranks: Mapping[str, int], tensors: Mapping[str, Tensor], folder: Path
    ) -> None:
        expected: dict[str, tuple[int, ...]] = {}
        for site in self._list_sites(spec):
            rank = ranks[site.name]
            shapes: dict[str, tuple[int, ...]] = {"a": (rank, site.num_in), "b": (site.num_out, rank)}
            if spec.dora:
                shapes["m"] = (site.num_out,)
            expected |= {f"{PREFIX}{site.name}.{SUFFIXES[part]}": shape for part, shape in shapes.items()}
        for name, shape in expected.items():
            if name not in tensors:
                raise RegistryError(f"{folder / WEIGHTS}: tensor {name} is missing")
            if tuple(tensors[name].shape) != shape:
                raise RegistryError(
                    f"{folder / WEIGHTS}: tensor {name} has shape {list(tensors[name].shape)}, but the base and the "
                    f"adapter's config ask for {list(shape)}; is it another base's adapter?"
                )
        if unexpected := sorted(tensors.keys() - expected.keys()):
            raise RegistryError(f"{folder / WEIGHTS}: tensor {unexpected[0]} has no place in this bank")

    def _shorten(self, targets: Sequence[str]) -> list[str]:
        """Return short names (`q_proj`) where they select exactly the targets, else full names."""
        short = {name.rsplit(".", 1)[-1] for name in targets}
        matched = {name for name, _ in self.model.named_modules() if name.rsplit(".", 1)[-1] in short}
        return sorted(short) if matched == set(targets) else sorted(targets)

    def _make_forward(self, site: AdaptedLinear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if self._route is None:
                return site.base(x)
            return apply_adapters(site, self._route(x.numel() // site.num_in), x)

        return forward


def _compute_alpha(scaling: float, rank: int, rslora: bool) -> float:
    return scaling * (math.sqrt(rank) if rslora else rank)
