"""Served adapters in slots: each weight is in memory once, slots are filled and freed, and a row finds its adapter.

`kernels.everywhere` makes a bank for a GPU on the CPU. That its results are right, test_engine.py and test_lora.py say.
"""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankloom import kernels
from rankloom.banks import slot_table
from rankloom.banks.linear_groups import LinearGroup
from rankloom.banks.served_adapter import Factors, ServedAdapter
from rankloom.banks.served_bank import AdapterShare, ServedBank
from rankloom.banks.slot_table import forecast_table_bytes
from rankloom.config.model import Int8, Nf4, Quantization
from rankloom.kernels.triton import lora as lora_triton
from rankloom.models import Base, find_target_linears, get_linear_widths
from served import completed, engine_on, load, publish, serving, with_peft, write_adapter

LAYER = "model.layers.0"
Q, K, V = (f"{LAYER}.self_attn.{name}_proj" for name in "qkv")


@pytest.fixture(autouse=True)
def everywhere() -> Iterator[None]:
    with kernels.everywhere():
        yield


@pytest.fixture
def base(tiny_llama: Path) -> Base:
    return load(tiny_llama)


def adapter_on(base: Base, names: list[str], rank: int, *, scaled: bool = False, seed: int = 0) -> ServedAdapter:
    draw = torch.Generator().manual_seed(seed)
    linears = {}
    for name in names:
        module: Any = base.model.get_submodule(name)
        a_RI = torch.randn(rank, module.in_features, generator=draw)
        b_RO = torch.randn(rank, module.out_features, generator=draw)
        vectors = [1 + torch.rand(module.out_features, generator=draw) if scaled else None for _ in range(2)]
        linears[name] = Factors(a_RI, b_RO, *vectors)
    return ServedAdapter(linears, {}, {})


def outputs(bank: ServedBank, base: Base, adapters: list[ServedAdapter | None], name: str, x_NI: Tensor) -> Tensor:
    """[N, O], with an adapter a row."""
    slots = bank.find_slots(adapters)
    assert slots is not None
    with torch.no_grad(), bank.apply_route(bank.route_rows(torch.tensor(slots, dtype=torch.int32))):
        y_1NO: Tensor = base.model.get_submodule(name)(x_NI[None])
    return y_1NO[0]


def expected(base: Base, adapters: list[ServedAdapter | None], name: str, x_NI: Tensor) -> Tensor:
    module: Any = base.model.get_submodule(name)
    y_NO = nn.functional.linear(x_NI, module.weight, module.bias).detach()
    for n, adapter in enumerate(adapters):
        if adapter is not None and (factors := adapter.linears.get(name)) is not None:
            factors.add_to(y_NO[n : n + 1], x_NI[n : n + 1])
    return y_NO


def test_rows_of_any_order_and_rank_find_their_adapters_as_the_table_grows(base: Base) -> None:
    bank, x_NI = ServedBank(base.model), torch.randn(7, 64)
    adapters = [adapter_on(base, [Q, V], rank, scaled=rank % 2 == 0, seed=rank) for rank in (1, 4, 16, 40, 90)]
    rows = [adapters[3], None, adapters[0], adapters[3], adapters[4], adapters[1], adapters[2]]
    wanted = {name: expected(base, rows, name, x_NI) for name in (Q, K, V)}
    generations = []
    for adapter in adapters:
        assert bank.find_slots([adapter]) is not None
        generations.append(bank.generation)
    assert generations == sorted(generations)
    assert generations[0] < generations[-1]
    for name, y_NO in wanted.items():
        torch.testing.assert_close(outputs(bank, base, rows, name, x_NI), y_NO, atol=1e-4, rtol=1e-4)
    before = bank.generation
    bank.find_slots(rows)
    assert bank.generation == before


def test_the_kernels_give_the_tokens_that_peft_gives(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In triton's interpreter: prompts, then decoding rows, of the base, a LoRA and a DoRA."""
    calls = Counter[str]()
    for name in ("lora_shrink", "lora_expand"):
        kernel = getattr(lora_triton, name)

        def counted(*args: Any, name: str = name, kernel: Any = kernel) -> Any:
            calls[name] += 1
            return kernel(*args)

        monkeypatch.setattr(slot_table, name, counted)
    folders: dict[str | None, Path | None] = {None: None}
    for kind in ("wide", "dora"):
        write_adapter(tiny_llama, tmp_path / kind, kind)
        folders[publish(tmp_path / "registry", tiny_llama, kind, tmp_path / kind)] = tmp_path / kind
    engine, prompts = engine_on(tiny_llama, tmp_path / "registry"), [[5, 6], [7, 8, 9, 10], [11]]

    async def work() -> list[list[int]]:
        waiting = [
            completed(engine, prompt, ref, id=str(ref), max_tokens=3)
            for ref, prompt in zip(folders, prompts, strict=True)
        ]
        return [tokens for _, tokens, _ in await asyncio.gather(*waiting)]

    found = serving(engine, work)
    assert found == [
        with_peft(tiny_llama, folder, prompt, 3) for folder, prompt in zip(folders.values(), prompts, strict=True)
    ]
    assert calls["lora_shrink"] == calls["lora_expand"] > 0


def test_no_weight_is_held_twice(base: Base) -> None:
    bank = ServedBank(base.model)
    weights = [base.model.get_submodule(name).get_parameter("weight") for name in (Q, K, V)]
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    adapters = [adapter_on(base, [Q, V], rank) for rank in (4, 40, 100)]
    sizes = [adapter.num_bytes for adapter in adapters]
    bank.find_slots(adapters)
    (rows,) = bank._table.rows.values()
    for adapter in adapters:
        for factors in adapter.linears.values():
            assert factors.a_RI.untyped_storage().data_ptr() == rows.a_PXI.untyped_storage().data_ptr()
            assert factors.b_RO.untyped_storage().data_ptr() == rows.b_XO.untyped_storage().data_ptr()
    assert [adapter.num_bytes for adapter in adapters] == sizes


@pytest.mark.parametrize(("num", "rank"), [(3, 8), (9, 8), (5, 40)])
def test_a_table_is_as_large_as_its_forecast(num: int, rank: int, base: Base) -> None:
    bank = ServedBank(base.model)
    names = find_target_linears(base.model, "all-linear")
    held = [adapter_on(base, names, rank) for _ in range(num)]
    bank.find_slots(held)
    table = bank._table
    found = sum(rows.a_PXI.nbytes + rows.b_XO.nbytes for rows in table.rows.values())
    widths = [get_linear_widths(base.model.get_submodule(name)) for name in names]
    assert found == forecast_table_bytes(widths, num, rank, value_bytes=base.model.dtype.itemsize)


def test_the_slot_of_an_adapter_that_is_gone_is_anothers(base: Base) -> None:
    bank, x_NI = ServedBank(base.model), torch.randn(2, 64)
    first, kept = adapter_on(base, [Q], 20), adapter_on(base, [Q], 3, seed=1)
    assert bank.find_slots([first, kept]) == [0, 1]
    generation = bank.generation
    del first
    gc.collect()
    later = adapter_on(base, [Q], 16, seed=2)
    wanted = expected(base, [kept, later], Q, x_NI)
    torch.testing.assert_close(outputs(bank, base, [kept, later], Q, x_NI), wanted, atol=1e-4, rtol=1e-4)
    assert bank.find_slots([kept, later]) == [1, 0]
    assert bank.generation == generation


def test_an_adapter_without_room_is_tried_again_when_a_slot_is_free(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = ServedBank(base.model)
    held, large = adapter_on(base, [Q], 50), adapter_on(base, [Q], 40)
    bank.find_slots([held])
    with monkeypatch.context() as patched:
        patched.setattr(slot_table.SlotTable, "_has_memory", lambda *_: False)
        assert bank.find_slots([held, large]) is None
        route = bank.route([AdapterShare(adapter, 1, 1) for adapter in (held, large)])
        assert [adapter for adapter, _ in route.body.loose] == [large]
        del held, route
        gc.collect()
        assert bank.find_slots([large]) == [0]


def test_what_is_more_than_linears_is_not_computed_by_rows_alone(base: Base) -> None:
    bank, norm = ServedBank(base.model), f"{LAYER}.input_layernorm"
    own = ServedAdapter({}, {}, {norm: base.model.get_submodule(norm)})
    assert bank.find_slots([None]) == [-1]
    assert bank.find_slots([None, own]) is None


@pytest.mark.parametrize("quantization", [Nf4(), Int8()], ids=["nf4", "int8"])
def test_quantised_linears_are_one_product(quantization: Quantization, tiny_llama: Path) -> None:
    base = load(tiny_llama, quantization)
    bank, x_NI = ServedBank(base.model), torch.randn(2, 64, dtype=base.model.dtype)
    adapter = adapter_on(base, [Q, V], 8)
    plain = [base.model.get_submodule(name)(x_NI[None])[0] for name in (Q, K, V)]
    for name, y_NO in zip((Q, K, V), plain, strict=True):
        if name in adapter.linears:
            adapter.linears[name].add_to(y_NO[1:], x_NI[1:])
        torch.testing.assert_close(outputs(bank, base, [None, adapter], name, x_NI), y_NO, atol=1e-4, rtol=1e-4)


def test_biases_of_a_group_are_merged_too() -> None:
    linears = {name: nn.Linear(8, width) for name, width in (("q", 6), ("k", 4))}
    x_NI = torch.randn(3, 8)
    plain = torch.cat([linear(x_NI) for linear in linears.values()], -1)
    group = LinearGroup(linears)
    torch.testing.assert_close(group.compute_base(x_NI), plain)
    torch.testing.assert_close(torch.cat([linear(x_NI) for linear in linears.values()], -1), plain)
    assert group.get_outputs(1) == slice(6, 10)


def test_in_a_graph_shrink_runs_beside_the_base(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, x_NI, events = ServedBank(base.model), torch.randn(1, 64), []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            events.append(f"{self.name} waits for {other.name}")

    class On:
        def __init__(self, stream: Stream) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            events.append(f"on {self.stream.name}")

        def __exit__(self, *_: object) -> None:
            events.append("back")

    adapter = adapter_on(base, [Q], 8)
    wanted = expected(base, [adapter], Q, x_NI)
    table: Any = bank._table
    for name in ("shrink", "expand"):
        call = getattr(table, name)
        monkeypatch.setattr(table, name, lambda *args, call=call, name=name: (events.append(name), call(*args))[1])
    main = Stream("main")
    monkeypatch.setattr(bank, "_is_recorded", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream("beside"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", On)
    torch.testing.assert_close(outputs(bank, base, [adapter], Q, x_NI), wanted, atol=1e-4, rtol=1e-4)
    assert events == ["beside waits for main", "on beside", "shrink", "back", "main waits for beside", "expand"]
