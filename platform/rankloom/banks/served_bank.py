"""ServedBank: many served adapters on one base, with an adapter per token of a forward.

Three ways give the same result. *Loose*, the reference: adapter by adapter, on views of its tokens. *Compiled*: all of
a linear's adapters in one call (`compiled.py`), the fastest measured way for fp32 on a CPU. *Stacked*, elsewhere:
adapters with few tokens are in slots of stacked tensors, and one batched call computes all of their products
(`grouped.py`, as in training); adapters with many tokens stay loose, which is as fast for them. Active slots are always
the first ones, so that stacks are read as views: a gather would copy the weights.

Shapes: N tokens sorted by adapter, K slots, I in, O out, R rank.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankloom.banks.compiled import KernelInput, addresses, kernel
from rankloom.banks.grouped import Stacked, Stacks, scale_spans, shift_spans
from rankloom.banks.groups import Groups
from rankloom.banks.served_adapter import Factors, ServedAdapter
from rankloom.models import chooses_experts, is_linear, linear_widths
from rankloom.models.onednn import pack

FEW = 8
"""Adapters with at most this many tokens in a forward are stacked."""
SMALLEST = 8
"""Smallest rank class. Ranks are rounded up to a power of two, and adapters of one class share stacks."""


@dataclass(frozen=True)
class AdapterShare:
    """One adapter's tokens in a forward."""

    adapter: ServedAdapter | None
    """None: the base."""
    num_tokens: int
    num_predicting: int
    """Number of these tokens that the output head sees."""


@dataclass(frozen=True)
class _Layout:
    """The assignment of tokens to adapters, for all modules that see the same tokens."""

    loose: tuple[tuple[ServedAdapter, slice], ...]
    stacked: tuple[tuple[int, Groups], ...]
    """Each rank class with its slots' tokens."""
    whole: tuple[tuple[ServedAdapter, slice], ...]
    """Tokens of the adapters that also have embeddings, experts or whole modules."""
    compiled: KernelInput | None = None
    """Replaces `loose` where one call per linear computes all of its adapters."""


@dataclass(frozen=True)
class TokenOrder:
    """The order of a forward's tokens, and their adapters."""

    order: tuple[int, ...]
    """Indices of the shares, in the order that the forward's tokens must have."""
    body: _Layout
    head: _Layout
    """For the output head, which sees only the predicting tokens."""


class ServedBank:
    """Replaces the `forward` of a base's linears; outside `routed` they compute as without a bank.

    Invariant: a stack's slot is zero wherever its adapter has nothing. One thread arranges slots and runs forwards with
    stacked adapters; other threads may run forwards with loose adapters at the same time.
    """

    def __init__(self, model: PreTrainedModel, *, pack: bool = False) -> None:
        """
        Args:
            pack: compute with copies of the base's weights in the fastest layout (`onednn.pack`).
        """
        self._pack = pack
        self._model, self._head = model, model.get_output_embeddings()
        self._device, self._dtype = next(model.parameters()).device, model.dtype
        self._local = threading.local()
        self._classes: dict[int, _Class] = {}
        self._patched: dict[str, tuple[nn.Module, Any]] = {}
        self._lock = threading.Lock()
        self._addresses: WeakKeyDictionary[ServedAdapter, np.ndarray] = WeakKeyDictionary()
        self._sites = {name: module for name, module in model.named_modules() if is_linear(module)}
        self.compiles = self._device.type == "cpu" and self._dtype == torch.float32
        if self.compiles:
            kernel()
            self._sizes_S2 = np.array([linear_widths(module) for module in self._sites.values()])
        for name, module in self._sites.items():
            self._patch(name, module, self._linear_at(name, module))

    def remove(self) -> None:
        """Restore the model's own forwards."""
        for module, before in self._patched.values():
            if before is None:
                vars(module).pop("forward", None)
            else:
                module.forward = before
        self._patched.clear()

    def admit(self, adapter: ServedAdapter) -> None:
        """Prepare an adapter for `route`; call once per adapter, from any thread."""
        with self._lock:
            if self.compiles:
                self._addresses[adapter] = addresses(adapter, list(self._sites))
            for name in (*adapter.embeddings, *adapter.whole, *adapter.experts):
                if name not in self._patched:
                    module = self._model.get_submodule(name)
                    other = self._mixture_at if chooses_experts(module) else self._other_at
                    self._patch(name, module, other(name, module))

    def route(self, shares: Sequence[AdapterShare], *, stack: bool = True) -> TokenOrder:
        """Order a forward's tokens, and put its adapters into slots.

        Args:
            shares: at most one per adapter, and one for the base.
            stack: whether to stack adapters; False leaves the slots unchanged.
        """
        stack = stack and not self.compiles
        by_class: dict[int, list[int]] = {}
        for i, share in enumerate(shares):
            if stack and share.adapter is not None and share.adapter.rank and share.num_tokens <= FEW:
                by_class.setdefault(_rank_class(share.adapter.rank), []).append(i)
        # a single adapter gains nothing from a stack
        slotted = {rank: members for rank, members in by_class.items() if len(members) > 1}
        order, stacks = [i for i, share in enumerate(shares) if share.adapter is None], []
        for rank, members in sorted(slotted.items()):
            in_slots = {shares[i].adapter: i for i in members}
            slots = self._class(rank, len(members), slotted.keys()).arrange(list(in_slots))  # type: ignore[arg-type]
            chosen = [in_slots[adapter] for adapter in slots]
            stacks.append((rank, chosen))
            order += chosen
        order += sorted({*range(len(shares))}.difference(order))
        body = _lay_out([(shares[i].adapter, shares[i].num_tokens, i) for i in order], stacks)
        body = self._compiled(body) if self.compiles else body
        if all(share.num_predicting == share.num_tokens for share in shares):  # true when all rows decode
            return TokenOrder(tuple(order), body, body)
        head = _lay_out([(shares[i].adapter, shares[i].num_predicting, i) for i in order], stacks)
        return TokenOrder(tuple(order), body, self._compiled(head) if self.compiles else head)

    @contextmanager
    def routed(self, route: TokenOrder) -> Iterator[None]:
        """Apply a route to this thread's forwards inside the context."""
        self._local.route = route
        try:
            yield
        finally:
            self._local.route = None

    def _layout(self, module: nn.Module) -> _Layout | None:
        route: TokenOrder | None = getattr(self._local, "route", None)
        if route is None:
            return None
        return route.head if module is self._head else route.body

    def _compiled(self, layout: _Layout) -> _Layout:
        """Return the layout with its loose adapters as compiled ones."""
        if not layout.loose:
            return layout
        adapters, spans = zip(*layout.loose, strict=True)
        table_SK5 = np.stack([self._addresses[adapter] for adapter in adapters], axis=1)
        spans_K2 = np.array([(span.start, span.stop) for span in spans])
        return replace(layout, loose=(), compiled=KernelInput(adapters, table_SK5, spans_K2, self._sizes_S2))

    def _class(self, rank: int, num_slots: int, at_work: Collection[int]) -> _Class:
        """Return a rank class with enough slots; making it larger drops the classes that are not in `at_work`."""
        if rank not in self._classes or self._classes[rank].num_slots < num_slots:
            kept = set(at_work) - {rank}
            self._classes = {other: stacks for other, stacks in self._classes.items() if other in kept}
            room = 1 << (num_slots - 1).bit_length()
            self._classes[rank] = _Class(self._sites, rank, room, self._device, self._dtype)
        return self._classes[rank]

    def _patch(self, name: str, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        self._patched[name] = (module, vars(module).get("forward"))
        module.forward = forward

    def _linear_at(self, name: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
        base = (pack(module) if self._pack else None) or module.forward
        on_cpu, site = self._device.type == "cpu", list(self._sites).index(name)

        def forward(x: Tensor) -> Tensor:
            y: Tensor = base(x)
            layout = self._layout(module)
            if layout is None:
                return y
            if layout.compiled:
                layout.compiled.add_to(y, x.contiguous(), site)
            if not (layout.stacked or layout.loose or layout.whole):
                return y
            x_NI, y_NO = x.flatten(0, -2), y.view(-1, y.shape[-1])
            for rank, groups in layout.stacked:
                if stack := self._classes[rank].stacks.get(name):
                    onto_NO = y_NO.float() if stack.scaled else y_NO  # round only after the factors
                    stack.add_to(onto_NO, x_NI, groups)
                    if stack.scaled:
                        scale_spans(onto_NO, stack.factor_KO, groups, by_slot=on_cpu)
                    if stack.shifted:
                        shift_spans(onto_NO, stack.shift_KO, groups, by_slot=on_cpu)
                    if onto_NO is not y_NO:
                        y_NO.copy_(onto_NO)
            for adapter, span in layout.loose:
                if factors := adapter.linears.get(name):
                    factors.add_to(y_NO[span], x_NI[span])
            for adapter, span in layout.whole:
                if own := adapter.whole.get(name):
                    y_NO[span] = own(x_NI[span])
            return y

        return forward

    def _other_at(self, name: str, module: nn.Module) -> Callable[..., Tensor]:
        base = module.forward

        def forward(x: Tensor) -> Tensor:
            y: Tensor = base(x)
            layout = self._layout(module)
            for adapter, span in layout.whole if layout else ():
                if factors := adapter.embeddings.get(name):
                    factors.add_to(y[0, span], x[0, span])
                elif own := adapter.whole.get(name):
                    y[0, span] = own(x[0, span])
            return y

        return forward

    def _mixture_at(self, name: str, module: nn.Module) -> Callable[..., Any]:
        """Return the forward of a router or of experts; all inputs and outputs are [N, .] or [1, N, .]."""
        base = module.forward

        def forward(*given: Tensor) -> Any:
            found = base(*given)
            layout = self._layout(module)
            for adapter, span in layout.whole if layout else ():
                factors = adapter.experts.get(name)
                if (own := factors.on(module) if factors else adapter.whole.get(name)) is not None:
                    theirs = own(*(_tokens(each)[span] for each in given))
                    for y, y_own in zip(_all(found), _all(theirs), strict=True):
                        _tokens(y)[span] = y_own
            return found

        return forward


def _tokens(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


def _all(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _rank_class(rank: int) -> int:
    return max(SMALLEST, 1 << (rank - 1).bit_length())


def _lay_out(
    counted: Sequence[tuple[ServedAdapter | None, int, int]], stacks: Sequence[tuple[int, Sequence[int]]]
) -> _Layout:
    """Return the layout of adapters with their tokens, which are in the order base, stacks, loose.

    Args:
        counted: (adapter, number of tokens, index of the share) of each share.
        stacks: each rank class with the indices of its shares, by slot.
    """
    spans, start = {}, 0
    for adapter, count, index in counted:
        spans[index] = (adapter, slice(start, start + count))
        start += count
    in_stack = {index for _, members in stacks for index in members}
    present = {i: (a, span) for i, (a, span) in spans.items() if a is not None and span.stop > span.start}
    loose = [share for i, share in present.items() if i not in in_stack]
    stacked = []
    for rank, members in stacks:
        counts = [spans[i][1].stop - spans[i][1].start for i in members]
        if any(counts):
            stacked.append((rank, Groups(counts, [rank] * len(members), start=spans[members[0]][1].start)))
    whole = [(adapter, span) for adapter, span in present.values() if adapter.is_more_than_linears]
    return _Layout(tuple(loose), tuple(stacked), tuple(whole))


class _Stack:
    """One linear's adapters of one rank class."""

    def __init__(self, module: nn.Module, rank: int, num_slots: int, device: torch.device, dtype: torch.dtype) -> None:
        num_in, num_out = linear_widths(module)
        # a view of [K, I, R], which reads faster in measurements
        self.a_KRI = torch.zeros(num_slots, num_in, rank, device=device, dtype=dtype).mT
        self.b_KOR = torch.zeros(num_slots, num_out, rank, device=device, dtype=dtype)
        self.factor_KO = torch.ones(num_slots, num_out, device=device)  # fp32, as in `Factors`
        self.shift_KO = torch.zeros(num_slots, num_out, device=device)
        self._views: dict[int, tuple[Tensor, Tensor]] = {}
        """Number of slots -> A and B of the first ones."""
        self.scaled: set[int] = set()
        """Slots with a factor."""
        self.shifted: set[int] = set()

    def add_to(self, y_NO: Tensor, x_NI: Tensor, groups: Groups) -> None:
        """Add the products as `Stacked.add` does, in fewer calls where nothing is padded, as in decoding."""
        if not groups.is_even or groups.slots[-1] != len(groups.slots) - 1:
            Stacked().add(y_NO, x_NI, Stacks(self.a_KRI, self.b_KOR, None, groups))
            return
        num_slots, span = len(groups.slots), groups.whole
        if num_slots not in self._views:
            self._views[num_slots] = (self.a_KRI[:num_slots].mT, self.b_KOR[:num_slots].mT)
        a_CIR, b_CRO = self._views[num_slots]
        h_CTR = torch.bmm(x_NI[span].view(num_slots, groups.most, -1), a_CIR)
        y_CTO = y_NO[span].view(num_slots, groups.most, -1)
        if y_CTO.dtype == h_CTR.dtype:
            y_CTO.baddbmm_(h_CTR, b_CRO)
        else:
            y_CTO.add_(torch.bmm(h_CTR, b_CRO))

    def put(self, slot: int, factors: Factors | None) -> None:
        """Set a slot; None: its adapter has no factors here."""
        a_RI, b_OR, rank = self.a_KRI[slot], self.b_KOR[slot], 0
        if factors is not None:
            rank = factors.rank
            a_RI[:rank] = factors.a_RI
            b_OR[:, :rank] = factors.b_RO.mT
        a_RI[rank:] = 0  # an earlier adapter may have had a higher rank
        b_OR[:, rank:] = 0
        _mark(slot, self.factor_KO, self.scaled, factors.factor_O if factors else None, neutral=1)
        _mark(slot, self.shift_KO, self.shifted, factors.shift_O if factors else None, neutral=0)


def _mark(slot: int, values_KO: Tensor, marked: set[int], given_O: Tensor | None, *, neutral: int) -> None:
    if given_O is not None:
        values_KO[slot] = given_O
        marked.add(slot)
    elif slot in marked:
        values_KO[slot] = neutral
        marked.remove(slot)


class _Class:
    """The slots of one rank class."""

    def __init__(
        self, sites: Mapping[str, nn.Module], rank: int, num_slots: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.num_slots = num_slots
        self._make = lambda module: _Stack(module, rank, num_slots, device, dtype)
        self._sites = sites
        self.stacks: dict[str, _Stack] = {}
        """By linear; only linears that an adapter was on have one."""
        self._held: list[ServedAdapter | None] = [None] * num_slots

    def arrange(self, wanted: Sequence[ServedAdapter]) -> list[ServedAdapter]:
        """Put adapters into the first slots, with as few copies as possible; return them by slot."""
        places = placed(self._held[: len(wanted)], wanted)
        for slot, adapter in enumerate(places):
            if self._held[slot] is not adapter:
                self._put(slot, adapter)
        return places

    def _put(self, slot: int, adapter: ServedAdapter) -> None:
        self._held[slot] = None  # stays None if memory runs out half-way
        for name in adapter.linears.keys() - self.stacks.keys():
            self.stacks[name] = self._make(self._sites[name])
        for name, stack in self.stacks.items():
            stack.put(slot, adapter.linears.get(name))
        self._held[slot] = adapter


def placed(held: Sequence[ServedAdapter | None], wanted: Sequence[ServedAdapter]) -> list[ServedAdapter]:
    """Assign wanted adapters to as many slots; an adapter that is already in one of them stays there.

    An adapter that moved forward is still in its old slot too; then its first slot counts.
    """
    stays = {adapter: slot for slot, adapter in reversed(list(enumerate(held))) if adapter and adapter in wanted}
    missing = iter([adapter for adapter in wanted if adapter not in stays])
    by_slot = {slot: adapter for adapter, slot in stays.items()}
    return [by_slot[slot] if slot in by_slot else next(missing) for slot in range(len(held))]
