"""AdapterBank: K adapters on one frozen base, stacked, so that one forward serves the rows of all of them.

At each target linear a `Site` holds A, B and DoRA magnitudes of every slot in one tensor each. A slot of a lower rank
than the bank's, or one that leaves a site out, is padded with zeros, whose gradients are exactly zero. The bank takes
the place of its linears' `forward`; outside `routed` the base computes as if the bank were not there. `grouped.py` has
the products; who is in which slot, how it is trained and who is served is not the bank's to know.

What a slot computes depends on its own values alone, so neighbours may come, go and diverge.

Shapes: N tokens of all rows sorted by slot, K slots, C slots at work, R rank, I in, O out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import peft
import torch
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rankloom.adapters.grouped import Groups, grouped_linear, grouped_lora, scale_rows
from rankloom.adapters.weights import PREFIX, read_adapter
from rankloom.config.method import DoraConfig, LoraConfig
from rankloom.errors import IncompatibleError, RegistryError
from rankloom.models import find_target_linears, is_linear
from rankloom.registry.checks import WEIGHTS

SUFFIXES = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}
"""How a PEFT folder's tensors end."""


@dataclass(frozen=True)
class SlotSpec:
    """What a slot holds."""

    rank: int
    alpha: float
    rslora: bool = False
    dora: bool = False
    init: Literal["default", "gaussian"] = "default"
    dropout: float = 0.0
    """On the adapter's input, where `routed` is given a seed."""
    targets: tuple[str, ...] = ()
    """Full names of the linears that it adapts."""
    seed: int = 0
    """Of the initial A, which is the one that PEFT draws after `torch.manual_seed(seed)`."""

    @classmethod
    def of(cls, method: LoraConfig | DoraConfig, model: PreTrainedModel, seed: int) -> SlotSpec:
        """What a method's settings ask for on a model."""
        if method.init not in ("default", "gaussian"):
            raise IncompatibleError(
                f"method.init: {method.init} can't be used in a bank (it starts from the base's weights, or changes "
                f"them, and the base is shared); allowed: default, gaussian"
            )
        return cls(
            rank=method.rank,
            alpha=method.alpha,
            rslora=method.rslora,
            dora=isinstance(method, DoraConfig),
            init="gaussian" if method.init == "gaussian" else "default",
            dropout=method.dropout,
            targets=tuple(find_target_linears(model, method.target_modules)),
            seed=seed,
        )

    @property
    def scaling(self) -> float:
        return _scaling(self.alpha, self.rank, self.rslora)


class Site:
    """One target linear with the adapters of all slots."""

    def __init__(self, name: str, module: nn.Module, num_slots: int, max_rank: int, *, with_magnitudes: bool) -> None:
        self.name, self.module = name, module
        self.base: Callable[[Tensor], Tensor] = module.forward
        """The linear as it was before the bank."""
        if isinstance(module, Conv1D):
            self.num_in, self.num_out = module.weight.shape
        else:
            assert isinstance(module, nn.Linear)
            self.num_in, self.num_out = module.in_features, module.out_features
        self.is_plain = type(module) in (nn.Linear, Conv1D) and "forward" not in vars(module)
        """Whether W is at hand as it is: neither quantised nor computed with in a way of its own."""
        device = module.weight.device
        self.a_KRI = nn.Parameter(torch.zeros(num_slots, max_rank, self.num_in, device=device))
        self.b_KOR = nn.Parameter(torch.zeros(num_slots, self.num_out, max_rank, device=device))
        self.m_KO = nn.Parameter(torch.zeros(num_slots, self.num_out, device=device)) if with_magnitudes else None
        self.ranks = [0] * num_slots
        """Of each slot's adapter; 0 where the slot leaves this site as it is."""
        self.dora_ranks = [0] * num_slots
        """The same, and 0 where it is no DoRA."""
        self.scales = [0.0] * num_slots
        self._squares_O: Tensor | None = None

    @property
    def weight_OI(self) -> Tensor:
        """W as it is stored."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.T if isinstance(self.module, Conv1D) else weight

    @property
    def is_int8_on_cpu(self) -> bool:
        return hasattr(self.module.weight, "SCB") and self.a_KRI.device.type == "cpu"

    @property
    def bias_O(self) -> Tensor | None:
        bias = self.module.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def parts(self, slot: int) -> dict[str, Tensor]:
        """Views of a slot's values, without padding."""
        rank = self.ranks[slot]
        found = {"a": self.a_KRI.data[slot, :rank], "b": self.b_KOR.data[slot, :, :rank]}
        if self.dora_ranks[slot] and self.m_KO is not None:
            found["m"] = self.m_KO.data[slot]
        return found

    def assign(self, slot: int, rank: int, scaling: float, *, dora: bool) -> None:
        self.ranks[slot], self.dora_ranks[slot] = rank, rank if dora else 0
        self.scales[slot] = scaling

    def clear(self, slot: int) -> None:
        self.assign(slot, 0, 0.0, dora=False)
        for stack in (self.a_KRI, self.b_KOR, self.m_KO):
            if stack is not None:
                stack.data[slot].zero_()

    @torch.no_grad()
    def norms(self, slots: Sequence[int]) -> Tensor:
        """[C, O]: the norms of the rows of W + s B A for DoRA slots, without computing B A.

        |w + s d|^2 = |w|^2 + 2 s <w, d> + s^2 |d|^2 with d a row of B A, so that <w, d> is the row product of B and
        W A^T, and |d|^2 that of B and B (A A^T). A row that is zero has norm 1: its magnitude has nothing to scale.
        """
        dense_OI = self.weight_OI if self.is_plain else dequantize_module_weight(self.module)
        dense_OI = dense_OI.float()
        if self._squares_O is None:
            self._squares_O = dense_OI.square().sum(1)
        rank = max(self.dora_ranks[slot] for slot in slots)
        a_CRI, b_COR = self.a_KRI[list(slots), :rank], self.b_KOR[list(slots), :, :rank]
        scale_C1 = torch.tensor([[self.scales[slot]] for slot in slots], device=a_CRI.device)
        across_COR = (dense_OI @ a_CRI.flatten(0, 1).T).view(self.num_out, len(slots), rank).transpose(0, 1)
        across_CO = (across_COR * b_COR).sum(-1)
        own_CO = (torch.bmm(b_COR, torch.bmm(a_CRI, a_CRI.mT)) * b_COR).sum(-1)
        squares_CO = self._squares_O + 2 * scale_C1 * across_CO + scale_C1.square() * own_CO
        return squares_CO.masked_fill_(squares_CO <= 0, 1).sqrt_()


@dataclass(frozen=True)
class _Route:
    """What one forward knows of its rows."""

    counts_K: tuple[int, ...]
    start: int
    """Tokens of no slot, which come first."""
    dropout: dict[int, tuple[float, torch.Generator]]
    """Probability and source of chance, for the slots whose dropout is on."""
    groups: dict[tuple[int, ...], Groups]
    """By the slots' ranks at a site; most sites share one."""

    def among(self, ranks: Sequence[int]) -> Groups:
        key = tuple(ranks)
        if key not in self.groups:
            self.groups[key] = Groups(self.counts_K, key, start=self.start)
        return self.groups[key]


class AdapterBank:
    """Slots for adapters on a frozen base.

    Invariant: a slot's values are zero wherever its adapter has none: beyond its rank, at sites that it leaves out,
    and everywhere while nothing is attached. After construction nothing is allocated for whoever comes and goes.
    """

    def __init__(
        self, model: PreTrainedModel, targets: Sequence[str], num_slots: int, max_rank: int, *, with_magnitudes: bool
    ) -> None:
        """Put an empty bank on a model's linears.

        Args:
            targets: full names of all linears that some slot may adapt.
            with_magnitudes: whether slots may be DoRA.
        """
        self.model, self.num_slots, self.max_rank = model, num_slots, max_rank
        self.with_magnitudes = with_magnitudes
        modules = dict(model.named_modules())
        for name in targets:
            if not is_linear(modules.get(name)):
                raise IncompatibleError(f"targets: {name} is no linear layer of this {type(model).__name__}")
        wanted = set(targets)
        self.sites: dict[str, Site] = {
            name: Site(name, module, num_slots, max_rank, with_magnitudes=with_magnitudes)
            for name, module in modules.items()  # the model's order is that in which PEFT draws
            if name in wanted
        }
        self.specs: dict[int, SlotSpec] = {}
        self._route: _Route | None = None
        self._forwards = {name: vars(site.module).get("forward") for name, site in self.sites.items()}
        for site in self.sites.values():
            site.module.forward = self._forward_at(site)  # type: ignore[method-assign]

    def remove(self) -> None:
        """Leave the model as it was before the bank."""
        for name, before in self._forwards.items():
            module = self.sites[name].module
            if before is None:
                vars(module).pop("forward", None)
            else:
                module.forward = before
        self._forwards.clear()

    def attach(self, slot: int, spec: SlotSpec) -> None:
        """Put a fresh adapter into a slot, in place of what is there.

        Raises:
            IncompatibleError: it does not fit into this bank; the slot is as before.
        """
        self._check(spec)
        self.detach(slot)
        self.specs[slot] = spec
        generator = torch.Generator().manual_seed(spec.seed)
        for site in self._sites_of(spec):
            site.assign(slot, spec.rank, spec.scaling, dora=spec.dora)
            parts = site.parts(slot)
            parts["a"].copy_(_drawn_as_by_peft(spec, site.num_in, site.num_out, generator))
            if "m" in parts:
                parts["m"].copy_(site.norms([slot])[0])

    def detach(self, slot: int) -> None:
        """Empty a slot."""
        self.specs.pop(slot, None)
        for site in self.sites.values():
            site.clear(slot)

    @contextmanager
    def routed(
        self, slots_N: Tensor, counts_K: Sequence[int], *, dropout_seeds: Mapping[int, int] | None = None
    ) -> Iterator[None]:
        """While it lasts, the model's forwards add to each token what its slot has for it.

        Args:
            slots_N: each token's slot, ascending; -1: none, the token sees the base alone.
            counts_K: tokens of each slot.
            dropout_seeds: a seed of this one forward for each slot whose dropout is to act.
        """
        counts_K = tuple(map(int, counts_K))
        dropout = {
            slot: (self.specs[slot].dropout, torch.Generator(slots_N.device).manual_seed(seed))
            for slot, seed in (dropout_seeds or {}).items()
            if slot in self.specs and self.specs[slot].dropout
        }
        self._route = _Route(counts_K, len(slots_N) - sum(counts_K), dropout, {})
        try:
            yield
        finally:
            self._route = None

    def state(self, slot: int) -> dict[str, Tensor]:
        """A slot's values without padding, on the CPU: `<site>.a`, `.b` and, of a DoRA, `.m`."""
        return {
            f"{site.name}.{part}": values.to("cpu", copy=True)
            for site in self._sites_of(self.specs[slot])
            for part, values in site.parts(slot).items()
        }

    def load_state(self, slot: int, state: Mapping[str, Tensor]) -> None:
        """Set an attached slot's values: the inverse of `state`."""
        for site in self._sites_of(self.specs[slot]):
            for part, values in site.parts(slot).items():
                values.copy_(state[f"{site.name}.{part}"])

    def copy(self, source: int, target: int) -> None:
        """Give an attached slot the values of another of the same shape; its scaling and dropout stay its own."""
        mine, theirs = self.specs[target], self.specs[source]
        shapes = [(set(spec.targets), spec.rank, spec.dora) for spec in (mine, theirs)]
        if shapes[0] != shapes[1]:
            raise IncompatibleError(f"slot {source} holds {theirs}, which can't be copied onto slot {target}: {mine}")
        for site in self._sites_of(theirs):
            for part, values in site.parts(source).items():
                site.parts(target)[part].copy_(values)

    def write(self, slot: int, folder: Path, base_id: str) -> None:
        """Write a slot's adapter as a PEFT folder of its true rank.

        Raises:
            RegistryError: the folder can't be written.
        """
        spec, sites = self.specs[slot], self._sites_of(self.specs[slot])
        others = [site for site in sites if site.ranks[slot] != spec.rank or site.scales[slot] != spec.scaling]
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=spec.rank,
            lora_alpha=spec.alpha,
            lora_dropout=spec.dropout,
            use_rslora=spec.rslora,
            use_dora=spec.dora,
            init_lora_weights=True if spec.init == "default" else spec.init,
            target_modules=self._short(spec.targets),
            rank_pattern={site.name: site.ranks[slot] for site in others},
            alpha_pattern={site.name: _alpha(site.scales[slot], site.ranks[slot], spec.rslora) for site in others},
            fan_in_fan_out=any(isinstance(site.module, Conv1D) for site in sites),
            inference_mode=True,
        )
        config.base_model_name_or_path = base_id
        tensors = {}
        for key, values in self.state(slot).items():
            name, part = key.rsplit(".", 1)
            tensors[f"{PREFIX}{name}.{SUFFIXES[part]}"] = values.contiguous()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            config.save_pretrained(folder)
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise RegistryError(f"{folder}: can't be written: {error}") from None

    def read(self, slot: int, folder: Path) -> None:
        """Put the adapter of a PEFT folder into a slot, in place of what is there.

        Raises:
            RegistryError: the folder is refused, by itself or by this bank; the slot is as before.
        """
        config, tensors = read_adapter(self.model, folder)
        if config.lora_bias or config.modules_to_save:
            raise RegistryError(
                f"{folder}: has biases or whole modules beside its adapters, which no bank has a place for"
            )
        ends = tuple(f".{target}" for target in config.target_modules)
        names = [name for name, _ in self.model.named_modules() if f".{name}".endswith(ends)]
        if outside := [name for name in names if name not in self.sites]:
            raise RegistryError(f"{folder}: adapts {outside[0]}, for which this bank has no site")
        spec = SlotSpec(
            rank=config.r,
            alpha=config.lora_alpha,
            rslora=config.use_rslora,
            dora=config.use_dora,
            dropout=config.lora_dropout,
            targets=tuple(names),
        )
        ranks, alphas = ({name: _by_pattern(pattern, name, common) for name in names} for pattern, common in (
            (config.rank_pattern, config.r), (config.alpha_pattern, config.lora_alpha)
        ))  # fmt: skip
        try:
            self._check(replace(spec, rank=max(ranks.values())))
        except IncompatibleError as error:
            raise RegistryError(f"{folder}: {error}") from None
        self._check_tensors(spec, ranks, tensors, folder)
        self.detach(slot)
        self.specs[slot] = spec
        for site in self._sites_of(spec):
            rank = ranks[site.name]
            site.assign(slot, rank, _scaling(alphas[site.name], rank, spec.rslora), dora=spec.dora)
            for part, values in site.parts(slot).items():
                values.copy_(tensors[f"{PREFIX}{site.name}.{SUFFIXES[part]}"])

    def _sites_of(self, spec: SlotSpec) -> list[Site]:
        targets = set(spec.targets)
        return [site for name, site in self.sites.items() if name in targets]

    def _check(self, spec: SlotSpec) -> None:
        if spec.rank > self.max_rank:
            raise IncompatibleError(f"rank {spec.rank} is above the bank's {self.max_rank}; open one of a higher rank")
        if outside := [name for name in spec.targets if name not in self.sites]:
            raise IncompatibleError(f"{outside[0]} is no site of this bank; open one whose targets cover it")
        if spec.dora and not self.with_magnitudes:
            raise IncompatibleError("this bank has no magnitudes, which DoRA trains; open one with them")
        if spec.dora and any(site.is_int8_on_cpu for site in self._sites_of(spec)):
            raise IncompatibleError(
                "quantization=int8 with method.type=dora needs CUDA: reading int8 weights for DoRA's norms on a CPU "
                "destroys their scales; use quantization: nf4 or none"
            )

    def _check_tensors(
        self, spec: SlotSpec, ranks: Mapping[str, int], tensors: Mapping[str, Tensor], folder: Path
    ) -> None:
        expected: dict[str, tuple[int, ...]] = {}
        for site in self._sites_of(spec):
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

    def _short(self, targets: Sequence[str]) -> list[str]:
        """Last names (`q_proj`) where these mean the same, else full names."""
        short = {name.rsplit(".", 1)[-1] for name in targets}
        matched = {name for name, _ in self.model.named_modules() if name.rsplit(".", 1)[-1] in short}
        return sorted(short) if matched == set(targets) else sorted(targets)

    def _forward_at(self, site: Site) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            return site.base(x) if self._route is None else _adapted(site, self._route, x)

        return forward


def _adapted(site: Site, route: _Route, x: Tensor) -> Tensor:
    """What a linear gives with every row's adapter."""
    groups = route.among(site.ranks)
    if not groups.slots:
        return site.base(x)
    assert x.numel() == groups.num_tokens * site.num_in, "routed was told of other rows"
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else site.a_KRI.dtype
    a_KRI, b_KOR = site.a_KRI.to(dtype), site.b_KOR.to(dtype)
    magnified = route.among(site.dora_ranks)
    dropped = [slot for slot in groups.slots if slot in route.dropout]
    restore_NO = None
    if not dropped and site.is_plain and (autocast or x.dtype == site.weight_OI.dtype == dtype):
        bias_O = None if site.bias_O is None else site.bias_O.to(dtype)
        y = grouped_linear(x.to(dtype), site.weight_OI.to(dtype), bias_O, a_KRI, b_KOR, site.scales, groups)
    else:
        base = site.base(x).contiguous()
        onto, x_dropped = base, x
        if dropped:
            x_dropped = x * _dropout_mask(x, dropped, groups, route)
            if redone := [slot for slot in dropped if slot in magnified.slots]:
                onto, restore_NO = _redone(site, base, x_dropped, redone, groups)
        y = grouped_lora(onto, x_dropped.to(dtype), a_KRI, b_KOR, site.scales, groups)
    if magnified.slots:
        assert site.m_KO is not None
        with torch.autocast(kind, enabled=False):
            norm_KO = torch.ones_like(site.m_KO)
            norm_KO[list(magnified.slots)] = site.norms(magnified.slots)
            factor_KO = site.m_KO / norm_KO  # the norm is a constant to the gradient (DoRA, section 4.3)
        y = scale_rows(y, factor_KO, site.bias_O, magnified)
    return y if restore_NO is None else y + restore_NO.view(y.shape)


def _dropout_mask(x: Tensor, dropped: Sequence[int], groups: Groups, route: _Route) -> Tensor:
    mask = torch.ones_like(x)
    mask_NI = mask.view(-1, x.shape[-1])
    for slot in dropped:
        probability, generator = route.dropout[slot]
        mask_NI[groups.spans[slot]].bernoulli_(1 - probability, generator=generator).div_(1 - probability)
    return mask


def _redone(site: Site, base: Tensor, x_dropped: Tensor, slots: Sequence[int], groups: Groups) -> tuple[Tensor, Tensor]:
    """As in PEFT, DoRA scales what W makes of the dropped input, and leaves W x beside it as it is.

    Returns:
        The base's result with W of the dropped input for these slots, and [N, O] what is to be added at the end.
    """
    spans = [groups.spans[slot] for slot in slots]
    tokens_M = torch.cat([torch.arange(span.start, span.stop) for span in spans]).to(base.device)
    base_NO = base.view(-1, site.num_out)
    again_MO = site.base(x_dropped.reshape(-1, site.num_in).index_select(0, tokens_M)).to(base.dtype)
    onto = base_NO.index_copy(0, tokens_M, again_MO).view(base.shape)
    difference_MO = base_NO.index_select(0, tokens_M) - again_MO
    return onto, torch.zeros_like(base_NO).index_copy(0, tokens_M, difference_MO)


def _drawn_as_by_peft(spec: SlotSpec, num_in: int, num_out: int, generator: torch.Generator) -> Tensor:
    """[R, I]: PEFT builds two linear layers, each of which draws its weights, and then draws A again."""
    a_RI = torch.empty(spec.rank, num_in)
    nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5), generator=generator)
    nn.init.kaiming_uniform_(torch.empty(num_out, spec.rank), a=math.sqrt(5), generator=generator)
    if spec.init == "gaussian":
        return nn.init.normal_(a_RI, std=1 / spec.rank, generator=generator)
    return nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5), generator=generator)


def _by_pattern(pattern: Mapping[str, int], name: str, common: int) -> int:
    """A layer's own rank or alpha, where PEFT's patterns give it one."""
    return pattern.get(get_pattern_key(list(pattern), name), common)


def _scaling(alpha: float, rank: int, rslora: bool) -> float:
    return alpha / (math.sqrt(rank) if rslora else rank)


def _alpha(scaling: float, rank: int, rslora: bool) -> float:
    return scaling * (math.sqrt(rank) if rslora else rank)
