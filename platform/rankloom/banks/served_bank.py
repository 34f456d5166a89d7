"""ServedBank: many served adapters on one base, with an adapter per token of a forward.

Three ways give the same result. *Loose*, the reference: adapter by adapter, on views of its tokens. *Compiled*, on a
CPU: all adapters in one call (`compiled.py`), in fp32. *In slots*, on CUDA: the adapters' weights are in one table
(`slot_table.py`), and two launches compute all of them. The last two take linears that read the same input together
(`linear_groups.py`). What a table can't hold stays loose.

Shapes: N tokens sorted by adapter, I in, O out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from operator import mul
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankloom.banks.compiled import KernelInput, KernelSites, build_addresses, gather_factors, load_kernel
from rankloom.banks.linear_groups import LinearGroup
from rankloom.banks.served_adapter import ServedAdapter
from rankloom.banks.slot_table import SlotTable, SlotTokens
from rankloom.errors import ModelError
from rankloom.kernels import use_on
from rankloom.models import chooses_experts, find_shared_inputs, is_linear

NO_SLOT = -1
"""In place of a slot: the base alone."""


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

    loose: tuple[tuple[ServedAdapter, slice], ...] = ()
    slots: SlotTokens | None = None
    whole: tuple[tuple[ServedAdapter, slice], ...] = ()
    """Tokens of the adapters that also have embeddings, experts or whole modules."""
    compiled: KernelInput | None = None
    """Replaces `loose` where one call computes all adapters."""
    counted: tuple[tuple[ServedAdapter | None, int, int | None], ...] = ()
    """Each adapter with its number of tokens and its slot, where there are adapters."""

    @cached_property
    def num_tokens(self) -> int:
        """The sum over `counted`, which each linear asks for."""
        return sum(count for _, count, _ in self.counted)


@dataclass(frozen=True)
class TokenOrder:
    """The order of a forward's tokens, and their adapters."""

    order: tuple[int, ...]
    """Indices of the shares, in the order that the forward's tokens must have."""
    body: _Layout
    head: _Layout
    """For the output head, which sees only the predicting tokens."""


class ServedBank:
    """Replaces the `forward` of a base's linears; outside `apply_route` they compute as without a bank.

    One thread puts adapters into slots and runs forwards with them; other threads may run forwards with loose adapters
    at the same time.
    """

    def __init__(self, model: PreTrainedModel, *, pack: bool = False) -> None:
        """
        Args:
            pack: compute with copies of the base's weights in the fastest layout (`onednn.pack`).
        """
        self._model, self._head = model, model.get_output_embeddings()
        self._device, self._dtype = next(model.parameters()).device, model.dtype
        self._local = threading.local()
        self._patched: dict[str, tuple[nn.Module, Any]] = {}
        self._lock = threading.Lock()
        self._addresses: WeakKeyDictionary[ServedAdapter, np.ndarray] = WeakKeyDictionary()
        linears = {name: module for name, module in model.named_modules() if is_linear(module)}
        self._is_fast = use_on(self._device)
        self.compiles = self._device.type == "cpu" and not self._is_fast
        together = find_shared_inputs(model) if self._is_fast or self.compiles else []
        in_groups = {name for names in together for name in names}
        alone = [[name] for name in linears if name not in in_groups]
        groups = [LinearGroup({name: linears[name] for name in names}, pack=pack) for names in (*together, *alone)]
        if self.compiles:
            load_kernel()
            self._names = [name for group in groups for name in group.names]
            self._sites = KernelSites([(group.num_in, group.widths) for group in groups])
        self._table = SlotTable(groups, torch.empty(0, dtype=self._dtype, device=self._device))
        self._beside: torch.cuda.Stream | None = None
        for index, group in enumerate(groups):
            for part, (name, module) in enumerate(zip(group.names, group.modules, strict=True)):
                self._patch(name, module, self._make_linear_forward(index, group, part))

    @property
    def generation(self) -> int:
        """Counts the changes after which a recorded CUDA graph of `route_rows` no longer holds."""
        return self._table.generation

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
                adapter.linears.update(gather_factors(adapter.linears))
                self._addresses[adapter] = build_addresses(adapter, self._names)
            for name in (*adapter.embeddings, *adapter.whole, *adapter.experts):
                module = self._model.get_submodule(name)
                if name not in self._patched and not isinstance(module, nn.Conv1d):  # which sees more than one token
                    other = self._make_mixture_forward if chooses_experts(module) else self._make_other_forward
                    self._patch(name, module, other(name, module))

    def route(self, shares: Sequence[AdapterShare], *, in_slots: bool = True) -> TokenOrder:
        """Order a forward's tokens, and put its adapters into slots.

        Args:
            shares: at most one per adapter, and one for the base.
            in_slots: whether to compute adapters in slots; False leaves the slots unchanged.
        """
        if not self.compiles:
            return self._route(shares, in_slots=in_slots)
        last = getattr(self._local, "last", None)
        if last is None or last[0] != shares:  # while rows decode, a step's shares are those of the step before
            self._local.last = last = shares, self._route(shares, in_slots=in_slots)
        order: TokenOrder = last[1]
        return order

    def _route(self, shares: Sequence[AdapterShare], *, in_slots: bool) -> TokenOrder:
        slot_of = self._hold(shares) if in_slots and self._is_fast else {}
        base = [i for i, share in enumerate(shares) if share.adapter is None]
        order = [*base, *slot_of, *sorted({*range(len(shares))}.difference(base, slot_of))]
        body = self._lay_out([(shares[i].adapter, shares[i].num_tokens, slot_of.get(i)) for i in order])
        if all(share.num_predicting == share.num_tokens for share in shares):  # true when all rows decode
            return TokenOrder(tuple(order), body, body)
        head = self._lay_out([(shares[i].adapter, shares[i].num_predicting, slot_of.get(i)) for i in order])
        return TokenOrder(tuple(order), body, head)

    def find_slots(self, adapters: Sequence[ServedAdapter | None]) -> list[int] | None:
        """Return the slot of each row's adapter, or `NO_SLOT`, for `route_rows`; None: some need `route`."""
        if not self._is_fast or any(adapter is not None and adapter.is_more_than_linears for adapter in adapters):
            return None
        slots = [NO_SLOT if adapter is None else self._table.hold(adapter) for adapter in adapters]
        return None if None in slots else slots  # type: ignore[return-value]

    def route_rows(self, slot_N: Tensor | None) -> TokenOrder:
        """Return the route of rows of one token, in any order, that all predict.

        Args:
            slot_N: int32, on the device: a recorded CUDA graph reads it again at each replay. None: all are the base's.
        """
        if slot_N is None:
            return TokenOrder((), _Layout(), _Layout())
        layout = _Layout(slots=SlotTokens.from_rows(slot_N))
        return TokenOrder(tuple(range(len(slot_N))), layout, layout)

    @contextmanager
    def apply_route(self, route: TokenOrder) -> Iterator[None]:
        """Apply a route to this thread's forwards inside the context."""
        self._local.route, self._local.results = route, {}
        try:
            yield
        finally:
            self._local.route, self._local.results = None, {}

    def _get_layout(self, module: nn.Module) -> _Layout | None:
        route: TokenOrder | None = getattr(self._local, "route", None)
        if route is None:
            return None
        return route.head if module is self._head else route.body

    def _hold(self, shares: Sequence[AdapterShare]) -> dict[int, int]:
        """Return the slots of those shares that are computed in slots."""
        slots = {i: self._table.hold(share.adapter) for i, share in enumerate(shares) if share.adapter is not None}
        return {i: slot for i, slot in slots.items() if slot is not None}

    def _lay_out(self, counted: Sequence[tuple[ServedAdapter | None, int, int | None]]) -> _Layout:
        """Return the layout of adapters with their numbers of tokens and slots (None: loose)."""
        loose, whole, start = [], [], 0
        for adapter, count, slot in counted:
            span = slice(start, start + count)
            start += count
            if adapter is None or not count:
                continue
            if slot is None:
                loose.append((adapter, span))
            if adapter.is_more_than_linears:
                whole.append((adapter, span))
        slots = None
        if any(slot is not None and count for _, count, slot in counted):
            counts = [(NO_SLOT if slot is None else slot, count) for _, count, slot in counted]
            slots = SlotTokens.from_counts(counts, self._device)
        is_adapted = loose or whole or slots
        layout = _Layout(tuple(loose), slots, tuple(whole), counted=tuple(counted) if is_adapted else ())
        return self._compile(layout) if self.compiles else layout

    def _fit(self, layout: _Layout, x: Tensor) -> _Layout:
        """Return the layout of a linear's input [..., I], which may have several rows for each token.

        Kimi Linear's latents do, as its layers expand those of the tokens before again.

        Raises:
            ModelError: the rows can't be told apart.
        """
        if not layout.counted:
            return layout
        num_rows, num_tokens = x.numel() // x.shape[-1], layout.num_tokens
        if num_rows == num_tokens:
            return layout
        if len(layout.counted) > 1 and num_tokens not in accumulate(x.shape[:-1], mul):
            raise ModelError(f"a layer of {type(self._model).__name__} gets {num_rows} rows for {num_tokens} tokens")
        return self._lay_out([(own, count * num_rows // num_tokens, slot) for own, count, slot in layout.counted])

    def _compile(self, layout: _Layout) -> _Layout:
        """Return the layout with its loose adapters as compiled ones."""
        if not layout.loose:
            return layout
        adapters, spans = zip(*layout.loose, strict=True)
        table_SK6 = np.stack([self._addresses[adapter] for adapter in adapters], axis=1)
        spans_K2 = np.array([(span.start, span.stop) for span in spans])
        return replace(layout, loose=(), compiled=KernelInput(adapters, table_SK6, spans_K2, self._sites))

    def _patch(self, name: str, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        self._patched[name] = (module, vars(module).get("forward"))
        module.forward = forward

    def _make_linear_forward(self, index: int, group: LinearGroup, part: int) -> Callable[[Tensor], Tensor]:
        """Return the forward of one of a group's linears: the first to be called computes them all."""
        module = group.modules[part]
        own = module.forward if len(group.names) > 1 else group.compute_base

        def forward(x: Tensor) -> Tensor:
            layout = self._get_layout(module)
            if layout is None:
                return own(x)
            layout = self._fit(layout, x)
            if len(group.names) == 1:
                return self._compute(index, group, x, layout)
            results: dict[int, tuple[Tensor, dict[int, Tensor]]] = self._local.results
            if index not in results or results[index][0] is not x or part not in results[index][1]:
                y = self._compute(index, group, x, layout)
                results[index] = x, dict(enumerate(y.split(group.widths, -1)))
            return results[index][1].pop(part)

        return forward

    def _compute(self, index: int, group: LinearGroup, x: Tensor, layout: _Layout) -> Tensor:
        """Return a group's results [..., O] with each token's adapter."""
        rows, tokens = self._table.rows.get(index), layout.slots
        if rows is None or tokens is None:
            y = group.compute_base(x)
            if layout.compiled:
                y = layout.compiled.add_to(y, x, index)
        else:
            with self._fork():
                h_SND = self._table.shrink(rows, x.flatten(0, -2), tokens)
            y = group.compute_base(x)
            self._join()
            self._table.expand(rows, y.view(-1, y.shape[-1]), h_SND, tokens)
        _add_alone(group, y, x, layout)
        return y

    def _fork(self) -> AbstractContextManager[Any]:
        """Launch inside the context beside what follows, in a CUDA graph; eagerly it would cost more than it gains."""
        if not self._is_recorded():
            return nullcontext()
        self._beside = self._beside or torch.cuda.Stream(self._device)
        self._beside.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._beside)

    def _join(self) -> None:
        if self._beside is not None and self._is_recorded():
            torch.cuda.current_stream().wait_stream(self._beside)

    def _is_recorded(self) -> bool:
        return self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _make_other_forward(self, name: str, module: nn.Module) -> Callable[..., Tensor]:
        base = module.forward

        def forward(x: Tensor) -> Tensor:
            y: Tensor = base(x)
            layout = self._get_layout(module)
            for adapter, span in layout.whole if layout else ():
                x_N, y_N = _join_batch(x)[span], _join_batch(y)[span]
                if factors := adapter.embeddings.get(name):
                    factors.add_to(y_N, x_N)
                elif own := adapter.whole.get(name):
                    y_N.copy_(own(x_N))
            return y

        return forward

    def _make_mixture_forward(self, name: str, module: nn.Module) -> Callable[..., Any]:
        """Return the forward of a router or of experts; all inputs and outputs are [N, .] or [B, T, .]."""
        base = module.forward

        def forward(*given: Tensor) -> Any:
            found = base(*given)
            layout = self._get_layout(module)
            for adapter, span in layout.whole if layout else ():
                factors = adapter.experts.get(name)
                if (own := factors.apply_to(module) if factors else adapter.whole.get(name)) is not None:
                    theirs = own(*(_drop_batch(each)[span] for each in given))
                    for y, y_own in zip(_as_tuple(found), _as_tuple(theirs), strict=True):
                        _drop_batch(y)[span] = y_own
            return found

        return forward


def _add_alone(group: LinearGroup, y: Tensor, x: Tensor, layout: _Layout) -> None:
    """Compute the adapters of a forward that are computed one by one, onto the base's results."""
    if not (layout.loose or layout.whole):
        return
    x_NI, y_NO = x.flatten(0, -2), y.view(-1, y.shape[-1])
    for part, name in enumerate(group.names):
        for adapter, span in layout.loose:
            if factors := adapter.linears.get(name):
                factors.add_to(y_NO[span, group.get_outputs(part)], x_NI[span])
        for adapter, span in layout.whole:
            if own := adapter.whole.get(name):
                y_NO[span, group.get_outputs(part)] = own(x_NI[span])


def _join_batch(x: Tensor) -> Tensor:
    """Return a view of [B, T, ...] as [N, ...]."""
    return x.view(-1, *x.shape[2:])


def _drop_batch(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


def _as_tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)
