"""The adapter bank against PEFT: initial values, forwards, gradients and folders, for plain, Conv1D and NF4 bases."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rankloom.adapters.weights import load_adapter
from rankloom.banks.bank import AdapterBank, SlotSpec
from rankloom.config.base import parse
from rankloom.config.method import DoraConfig, LoraConfig
from rankloom.config.trial import TrialConfig
from rankloom.errors import IncompatibleError, RegistryError
from rankloom.models import Base, find_target_linears, load_base

CPU = torch.device("cpu")
LENGTH = 7
BASES = [("llama", "none"), ("qwen", "none"), ("gpt2", "none"), ("llama", "nf4"), ("qwen", "int8")]
"""Plain with and without biases, Conv1D, NF4, int8."""
ATTENTION = {"llama": ["q_proj", "v_proj"], "qwen": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}

Opener = Callable[[str, str], Base]


@pytest.fixture
def open_base(tiny_model: Callable[..., Path]) -> Opener:
    def opened(architecture: str, quantization: str) -> Base:
        tree = {"name": "t", "model": {"id": str(tiny_model(architecture))}, "quantization": quantization}
        trial = parse(TrialConfig, tree)
        return load_base(trial.model, trial.quantization, device=CPU)

    return opened


def specs_of(base: Base, architecture: str) -> list[SlotSpec]:
    """Members of different ranks, scalings, targets and kinds."""
    methods: list[LoraConfig | DoraConfig] = [
        LoraConfig(rank=4, alpha=8),
        DoraConfig(rank=8, alpha=8),
        LoraConfig(rank=2, alpha=16, rslora=True, init="gaussian", target_modules=ATTENTION[architecture]),
        DoraConfig(rank=3, alpha=4, target_modules=ATTENTION[architecture]),
    ]
    return [SlotSpec.from_method(method, base.model, seed) for seed, method in enumerate(methods)]


def bank_of(base: Base, *, num_slots: int = 4, max_rank: int = 8, with_magnitudes: bool = True) -> AdapterBank:
    targets = find_target_linears(base.model, "all-linear")
    return AdapterBank(base.model, targets, num_slots, max_rank, with_magnitudes=with_magnitudes)


def moved(bank: AdapterBank, slot: int) -> None:
    """Away from the initial values, where B is zero and DoRA's factors are one."""
    generator = torch.Generator().manual_seed(100 + slot)
    state = bank.get_state(slot)
    for values in state.values():
        values.add_(torch.randn(values.shape, generator=generator) * 0.05)
    bank.load_state(slot, state)


def rows_of(rows: list[int], *, first: int = 0) -> tuple[Tensor, Tensor, list[int]]:
    """Token ids [B, T] of each slot's rows (after `first` rows of none), each token's slot, each slot's tokens."""
    generator = torch.Generator().manual_seed(3)
    ids_BT = torch.randint(5, 200, (first + sum(rows), LENGTH), generator=generator)
    slots = [-1] * first + [slot for slot, count in enumerate(rows) for _ in range(count)]
    return ids_BT, torch.tensor(slots).repeat_interleave(LENGTH), [count * LENGTH for count in rows]


def parted(tensor: Tensor, rows: list[int], slot: int, *, first: int = 0) -> Tensor:
    start = first + sum(rows[:slot])
    return tensor[start : start + rows[slot]]


def stack_of(bank: AdapterBank, name: str) -> Tensor:
    """The stack that holds a parameter of all slots."""
    site = bank.sites[name.rsplit(".", 1)[0]]
    stack = {"a": site.a_KRI, "b": site.b_KOR, "m": site.m_KO}[name[-1]]
    assert stack is not None
    return stack


def gradient_of(bank: AdapterBank, slot: int, name: str) -> Tensor:
    """A slot's gradient of a parameter, without what pads its rank."""
    gradient, rank = stack_of(bank, name).grad, bank.specs[slot].rank
    assert gradient is not None
    return {"a": gradient[slot, :rank], "b": gradient[slot, ..., :rank], "m": gradient[slot]}[name[-1]]


def peft_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """In the bank's spelling."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            site = name.removeprefix("base_model.model.")
            found[f"{site}.a"] = module.lora_A["default"].weight
            found[f"{site}.b"] = module.lora_B["default"].weight
            if "default" in module.lora_magnitude_vector:
                found[f"{site}.m"] = module.lora_magnitude_vector["default"].weight
    return found


@pytest.mark.parametrize(("architecture", "quantization"), BASES)
def test_initial_values_are_those_of_peft(architecture: str, quantization: str, open_base: Opener) -> None:
    bank = bank_of(open_base(architecture, quantization))
    specs = specs_of(open_base(architecture, quantization), architecture)
    for slot, spec in enumerate(specs):
        bank.attach(slot, spec)
    for slot, spec in enumerate(specs):
        base = open_base(architecture, quantization)
        config = peft.LoraConfig(
            r=spec.rank, lora_alpha=spec.alpha, use_rslora=spec.rslora, use_dora=spec.dora,
            target_modules=list(spec.targets), init_lora_weights=True if spec.init == "default" else "gaussian",
            fan_in_fan_out=architecture == "gpt2", task_type="CAUSAL_LM",
        )  # fmt: skip
        torch.manual_seed(spec.seed)
        expected = peft_parameters(peft.get_peft_model(base.model, config))
        found = bank.get_state(slot)
        assert found.keys() == expected.keys()
        for name, values in found.items():
            if name.endswith(".m"):  # the norms are reached on another way
                torch.testing.assert_close(values, expected[name].data)
            else:
                assert torch.equal(values, expected[name]), name


@pytest.mark.parametrize(("architecture", "quantization"), BASES)
@pytest.mark.parametrize(("rows", "first"), [([2, 2, 2, 2], 0), ([1, 3, 0, 2], 2)])
def test_mixed_rows_are_what_peft_gives_each(
    architecture: str, quantization: str, rows: list[int], first: int, open_base: Opener, tmp_path: Path
) -> None:
    base = open_base(architecture, quantization)
    specs = specs_of(base, architecture)
    bank = bank_of(base)
    for slot, spec in enumerate(specs):
        bank.attach(slot, spec)
        moved(bank, slot)
        bank.write(slot, tmp_path / str(slot), "base")
    ids_BT, slots_N, counts_K = rows_of(rows, first=first)
    with bank.apply_route(slots_N, counts_K):
        logits_BTV = base.model(input_ids=ids_BT).logits
        logits_BTV.float().log_softmax(-1).select(-1, 3).sum().backward()
    plain = open_base(architecture, quantization)
    with torch.no_grad():
        expected = plain.model(input_ids=ids_BT[:first]).logits if first else logits_BTV[:0]
    torch.testing.assert_close(logits_BTV[:first], expected, atol=1e-4, rtol=1e-4)
    for slot, spec in enumerate(specs):
        model = peft.PeftModel.from_pretrained(plain.model, tmp_path / str(slot), is_trainable=True)
        if rows[slot]:
            alone_BTV = model(input_ids=parted(ids_BT, rows, slot, first=first)).logits
            torch.testing.assert_close(parted(logits_BTV, rows, slot, first=first), alone_BTV, atol=1e-4, rtol=1e-4)
            alone_BTV.float().log_softmax(-1).select(-1, 3).sum().backward()
        for name, parameter in peft_parameters(model).items():
            stack, part = stack_of(bank, name), name[-1]
            assert stack.grad is not None
            gradient = stack.grad[slot]
            if part != "m":  # what pads the rank
                assert not (gradient[spec.rank :] if part == "a" else gradient[:, spec.rank :]).any()
                gradient = gradient[: spec.rank] if part == "a" else gradient[:, : spec.rank]
            expected = torch.zeros_like(gradient) if parameter.grad is None else parameter.grad
            assert (gradient - expected).norm() <= 1e-4 * expected.norm(), name
        for name, site in bank.sites.items():
            if name not in spec.targets and site.b_KOR.grad is not None:
                assert not site.b_KOR.grad[slot].any()
        model.unload()


class _Replay(nn.Module):
    """Dropout as the bank draws it."""

    def __init__(self, probability: float, generator: torch.Generator) -> None:
        super().__init__()
        self.probability, self.generator = probability, generator

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.empty_like(x).view(-1, x.shape[-1]).bernoulli_(1 - self.probability, generator=self.generator)
        return x * mask.div_(1 - self.probability).view(x.shape)


@pytest.mark.parametrize(("architecture", "quantization"), BASES)
def test_dropout_is_that_of_peft(architecture: str, quantization: str, open_base: Opener, tmp_path: Path) -> None:
    base = open_base(architecture, quantization)
    specs = [replace(spec, dropout=0.3) for spec in specs_of(base, architecture)]
    specs[0] = replace(specs[0], dropout=0.0)
    bank = bank_of(base)
    for slot, spec in enumerate(specs):
        bank.attach(slot, spec)
        moved(bank, slot)
        bank.write(slot, tmp_path / str(slot), "base")
    rows = [2, 2, 1, 3]
    ids_BT, slots_N, counts_K = rows_of(rows)
    with bank.apply_route(slots_N, counts_K, dropout_seeds=dict.fromkeys(range(4), 11)):
        logits_BTV = base.model(input_ids=ids_BT).logits
        logits_BTV.float().log_softmax(-1).select(-1, 3).sum().backward()
    with torch.no_grad(), bank.apply_route(slots_N, counts_K):
        quiet_BTV = base.model(input_ids=ids_BT).logits
    torch.testing.assert_close(parted(quiet_BTV, rows, 0), parted(logits_BTV, rows, 0), atol=1e-5, rtol=1e-5)
    plain = open_base(architecture, quantization)
    for slot, spec in enumerate(specs):
        model = peft.PeftModel.from_pretrained(plain.model, tmp_path / str(slot), is_trainable=True).eval()
        if spec.dropout:
            assert not torch.allclose(parted(quiet_BTV, rows, slot), parted(logits_BTV, rows, slot), atol=1e-2)
            generator = torch.Generator().manual_seed(11)
            for module in model.modules():
                if isinstance(module, LoraLayer):
                    module.training = True
                    module.lora_dropout["default"] = _Replay(spec.dropout, generator)
        alone_BTV = model(input_ids=parted(ids_BT, rows, slot)).logits
        torch.testing.assert_close(parted(logits_BTV, rows, slot), alone_BTV, atol=1e-4, rtol=1e-4)
        alone_BTV.float().log_softmax(-1).select(-1, 3).sum().backward()
        for name, parameter in peft_parameters(model).items():
            assert parameter.grad is not None
            gradient = gradient_of(bank, slot, name)
            assert (gradient - parameter.grad).norm() <= 1e-4 * parameter.grad.norm(), name
        model.unload()


def test_a_members_dropout_depends_on_its_own_seed_alone(open_base: Opener) -> None:
    base = open_base("llama", "none")
    bank = bank_of(base)
    for slot, spec in enumerate(specs_of(base, "llama")):
        bank.attach(slot, replace(spec, dropout=0.3))
        moved(bank, slot)

    def logits_of_slot_1(rows: list[int], seeds: dict[int, int]) -> Tensor:
        ids_BT = torch.arange(sum(rows) * LENGTH).view(-1, LENGTH) % 50
        ids_BT[sum(rows[:1]) : sum(rows[:2])] = torch.arange(2 * LENGTH).view(2, LENGTH)
        _, slots_N, counts_K = rows_of(rows)
        with torch.no_grad(), bank.apply_route(slots_N, counts_K, dropout_seeds=seeds):
            return parted(base.model(input_ids=ids_BT).logits, rows, 1)

    found = logits_of_slot_1([2, 2, 2, 2], {0: 1, 1: 2, 2: 3, 3: 4})
    for rows, seeds in (([0, 2, 0, 0], {1: 2}), ([1, 2, 3, 0], {0: 9, 1: 2})):
        torch.testing.assert_close(logits_of_slot_1(rows, seeds), found, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits_of_slot_1([2, 2, 2, 2], {0: 1, 1: 3}), found, atol=1e-3)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_bf16(stored: torch.dtype, autocast: bool, open_base: Opener, tmp_path: Path) -> None:
    """In bf16, the bank is as near to fp32 as PEFT is."""
    exact = open_base("llama", "none")
    base = open_base("llama", "none")
    base.model.to(stored)
    bank = bank_of(base)
    ids_BT, slots_N, counts_K = rows_of([2, 2, 1, 1])
    for slot, spec in enumerate(specs_of(base, "llama")):
        bank.attach(slot, spec)
        moved(bank, slot)
        bank.write(slot, tmp_path / str(slot), "base")
    with bank.apply_route(slots_N, counts_K), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits_BTV = base.model(input_ids=ids_BT).logits
        logits_BTV.float().log_softmax(-1).select(-1, 3).sum().backward()
    for slot in range(4):
        model = load_adapter(exact.model, tmp_path / str(slot)).requires_grad_(True)
        expected_BTV = model(input_ids=parted(ids_BT, [2, 2, 1, 1], slot)).logits
        difference = parted(logits_BTV, [2, 2, 1, 1], slot).float() - expected_BTV
        assert difference.norm() <= 0.03 * expected_BTV.norm()
        expected_BTV.log_softmax(-1).select(-1, 3).sum().backward()
        for name, parameter in peft_parameters(model).items():
            assert parameter.grad is not None
            gradient = gradient_of(bank, slot, name)
            assert stack_of(bank, name).dtype == gradient.dtype == torch.float32
            assert (gradient - parameter.grad).norm() <= 0.15 * parameter.grad.norm(), name
        model.unload()


@pytest.mark.parametrize(("architecture", "quantization"), BASES)
def test_folders_go_both_ways(architecture: str, quantization: str, open_base: Opener, tmp_path: Path) -> None:
    base = open_base(architecture, quantization)
    bank = bank_of(base)
    ids_BT, _, _ = rows_of([2])
    for slot, spec in enumerate(specs_of(base, architecture)):
        bank.attach(slot, spec)
        moved(bank, slot)
        bank.write(slot, tmp_path / str(slot), "some/base")
    plain = open_base(architecture, quantization)
    for slot, spec in enumerate(specs_of(base, architecture)):
        config = json.loads((tmp_path / str(slot) / "adapter_config.json").read_text())
        assert (config["r"], config["base_model_name_or_path"]) == (spec.rank, "some/base")
        assert all("." not in target for target in config["target_modules"])
        model = load_adapter(plain.model, tmp_path / str(slot))
        with torch.no_grad():
            expected_BTV = model(input_ids=ids_BT).logits
        model.unload()
        before = bank.get_state(slot)
        bank.detach(slot)
        bank.read(slot, tmp_path / str(slot))
        assert replace(bank.specs[slot], init=spec.init, seed=spec.seed) == replace(
            spec, targets=bank.specs[slot].targets
        )
        after = bank.get_state(slot)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        slots_N = torch.full((2 * LENGTH,), slot)
        with torch.no_grad(), bank.apply_route(slots_N, [2 * LENGTH * (k == slot) for k in range(4)]):
            found_BTV = base.model(input_ids=ids_BT).logits
        torch.testing.assert_close(found_BTV, expected_BTV, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_with_ranks_of_each_layer(rslora: bool, open_base: Opener, tmp_path: Path) -> None:
    base = open_base("llama", "none")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, use_rslora=rslora, init_lora_weights=False, task_type="CAUSAL_LM",
        target_modules=["q_proj", "o_proj"], rank_pattern={"layers.0.self_attn.q_proj": 7},
        alpha_pattern={} if rslora else {"o_proj": 3},
    )  # fmt: skip
    model = peft.get_peft_model(base.model, config)
    ids_BT = torch.arange(2 * LENGTH).view(2, LENGTH)
    with torch.no_grad():
        expected_BTV = model(input_ids=ids_BT).logits
    model.save_pretrained(tmp_path / "peft")
    base = open_base("llama", "none")
    bank = bank_of(base)
    bank.read(2, tmp_path / "peft")
    bank.write(2, tmp_path / "ours", "base")
    bank.read(1, tmp_path / "ours")
    for slot in (1, 2):
        counts_K = [2 * LENGTH if k == slot else 0 for k in range(4)]
        with torch.no_grad(), bank.apply_route(torch.full((2 * LENGTH,), slot), counts_K):
            torch.testing.assert_close(base.model(input_ids=ids_BT).logits, expected_BTV, atol=1e-4, rtol=1e-4)
    bank.copy(2, 1)
    assert bank.sites["model.layers.0.self_attn.q_proj"].ranks[1] == 7


def test_slots_come_and_go_in_place(open_base: Opener) -> None:
    base = open_base("llama", "none")
    ids_BT = torch.arange(2 * LENGTH).view(2, LENGTH)
    with torch.no_grad():
        alone_BTV = base.model(input_ids=ids_BT).logits
    before = set(base.model.state_dict())
    bank = bank_of(base, num_slots=2)
    parameters = [p for s in bank.sites.values() for p in (s.a_KRI, s.b_KOR, s.m_KO) if p is not None]
    places = [p.data_ptr() for p in parameters]
    first, second = specs_of(base, "llama")[:2]
    bank.attach(0, first)
    bank.attach(1, second)
    moved(bank, 1)
    kept = bank.get_state(0)
    bank.attach(1, replace(first, rank=2, targets=first.targets[:3]))
    for name, site in bank.sites.items():
        assert not site.a_KRI[1, 2:].any()
        assert not site.b_KOR[1].any()
        assert bool(site.a_KRI[1, :2].any()) == (name in first.targets[:3])
    bank.detach(1)
    assert not any(p[1].any() for p in parameters)
    assert [p.data_ptr() for p in parameters] == places
    assert all(torch.equal(values, kept[name]) for name, values in bank.get_state(0).items())
    with torch.no_grad():  # outside `apply_route`, and in it for rows of no slot or of an empty one
        assert torch.equal(base.model(input_ids=ids_BT).logits, alone_BTV)
        for slot in (-1, 1):
            counts_K = [0, 2 * LENGTH if slot == 1 else 0]
            with bank.apply_route(torch.full((2 * LENGTH,), slot), counts_K):
                assert torch.equal(base.model(input_ids=ids_BT).logits, alone_BTV)
    assert set(base.model.state_dict()) == before
    bank.remove()
    assert not any("forward" in vars(module) for module in base.model.modules())
    with torch.no_grad():
        assert torch.equal(base.model(input_ids=ids_BT).logits, alone_BTV)


def test_values_are_copied_and_scalings_are_not(open_base: Opener) -> None:
    base = open_base("llama", "none")
    bank = bank_of(base)
    lora, dora = specs_of(base, "llama")[:2]
    bank.attach(0, dora)
    bank.attach(1, replace(dora, alpha=32.0, seed=9))
    bank.attach(2, lora)
    moved(bank, 0)
    bank.copy(0, 1)
    source, target = bank.get_state(0), bank.get_state(1)
    assert all(torch.equal(source[name], target[name]) for name in source)
    assert {site.scales[1] for site in bank.sites.values()} == {4.0}
    with pytest.raises(IncompatibleError, match="can't be copied onto slot 2"):
        bank.copy(0, 2)
    bank.load_state(0, {name: values + 1 for name, values in source.items()})
    assert all(torch.equal(values, source[name] + 1) for name, values in bank.get_state(0).items())
    assert all(torch.equal(target[name], values) for name, values in bank.get_state(1).items())


def test_a_zero_row_of_the_base_is_no_nan(open_base: Opener) -> None:
    base = open_base("llama", "none")
    with torch.no_grad():
        base.model.get_submodule("model.layers.0.mlp.up_proj").weight[3] = 0
    bank = bank_of(base, num_slots=1)
    bank.attach(0, specs_of(base, "llama")[1])
    with bank.apply_route(torch.zeros(LENGTH, dtype=torch.long), [LENGTH]):
        base.model(input_ids=torch.arange(LENGTH)[None]).logits.sum().backward()
    for site in bank.sites.values():
        for stack in (site.a_KRI, site.b_KOR, site.m_KO):
            assert stack is not None
            assert stack.grad is not None
            assert stack.grad.isfinite().all()


def test_what_does_not_fit_is_refused(open_base: Opener) -> None:
    base = open_base("llama", "none")
    spec = specs_of(base, "llama")[1]
    with pytest.raises(IncompatibleError, match=r"model\.norm is not a linear layer of this LlamaForCausalLM"):
        AdapterBank(base.model, ["model.norm"], 2, 4, with_magnitudes=False)
    bank = AdapterBank(base.model, spec.targets[:2], 2, 4, with_magnitudes=False)
    for change, message in (
        ({"rank": 5}, "rank 5 is above the bank's 4"),
        ({"rank": 4}, "is not a site of this bank"),
        ({"rank": 4, "targets": spec.targets[:2]}, "this bank has no magnitudes"),
    ):
        with pytest.raises(IncompatibleError, match=message):
            bank.attach(0, replace(spec, **change))  # type: ignore[arg-type]
        assert not bank.specs
    with pytest.raises(IncompatibleError, match=r"method\.init: pissa can't be used in a bank"):
        SlotSpec.from_method(LoraConfig(init="pissa"), base.model, 0)


@pytest.fixture
def written(open_base: Opener, tmp_path: Path) -> tuple[AdapterBank, Path]:
    base = open_base("llama", "none")
    bank = bank_of(base)
    bank.attach(0, specs_of(base, "llama")[1])
    moved(bank, 0)
    bank.write(0, tmp_path / "adapter", "base")
    bank.attach(1, specs_of(base, "llama")[2])
    return bank, tmp_path / "adapter"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_bias": True, "use_dora": False}, "without biases, whole modules or experts"),
        ({"lora_bias": True}, "lora_bias=True is not supported for DoRA"),
        ({"modules_to_save": ["norm"]}, "without biases, whole modules or experts"),
        ({"target_modules": ["q_proj", "lm_head"]}, "adapts lm_head, which is not a site of this bank"),
        ({"target_modules": ["q_proj"]}, "has no place in this bank"),
        ({"target_modules": ["q_proj", "norm"]}, "norm"),
        ({"r": 4, "rank_pattern": {}}, r"has shape \[8, 64\], but .* ask for \[4, 64\]"),
        ({"use_dora": False}, "lora_magnitude_vector has no place"),
        ({"auto_mapping": {"parent_library": "os"}}, "auto_mapping"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(
    change: dict[str, Any], message: str, written: tuple[AdapterBank, Path]
) -> None:
    bank, folder = written
    before, spec = bank.get_state(1), bank.specs[1]
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(RegistryError, match=message):
        bank.read(1, folder)
    assert bank.specs[1] == spec
    assert all(torch.equal(values, before[name]) for name, values in bank.get_state(1).items())


def test_a_folder_with_other_tensors_is_refused(written: tuple[AdapterBank, Path]) -> None:
    bank, folder = written
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    for change, message in (
        ({name: tensors[name][..., :-1].contiguous()}, "has shape"),
        ({"extra": torch.zeros(1)}, "extra has no place in this bank"),
        ({name: tensors[name] * torch.nan}, "not finite numbers"),
    ):
        save_file(tensors | change, file)
        with pytest.raises(RegistryError, match=message):
            bank.read(1, folder)
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    with pytest.raises(RegistryError, match="is missing"):
        bank.read(1, folder)
    small = AdapterBank(bank.model, list(bank.sites), 1, 4, with_magnitudes=True)
    save_file(tensors, file)
    with pytest.raises(RegistryError, match="rank 8 is above the bank's 4"):
        small.read(0, folder)
