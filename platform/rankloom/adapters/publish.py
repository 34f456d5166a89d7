"""An adapter's folder into the registry: with its own record, or as PEFT wrote it, plainly and with a probe."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import ValidationError

from rankloom.errors import RegistryError
from rankloom.registry import BaseModelRef, Draft, Record, Registry, Versions, check_name
from rankloom.registry.checks import (
    CARD,
    CONFIG,
    RECORD,
    WEIGHTS,
    check_contents,
    check_files,
    find_files,
    read_config,
    rename_in_errors,
)

PROBE_TEXT = "The quick brown fox jumps over the lazy dog."


def publish_folder(
    folder: Path, registry: Registry, name: str, base: str | None = None, *, on_note: Callable[[str], None]
) -> Record:
    """Publish a folder as the next version of `name`.

    Args:
        base: The base's id, for a folder without a record whose adapter_config.json names another or none.
        on_note: Called with what of the folder is changed, or not published.

    Raises:
        RegistryError: The folder is not an adapter's, or its record does not describe it.
    """
    check_name(name)
    has_record = (folder / RECORD).is_file()
    if has_record and base:
        raise RegistryError(f"--base {base!r}: {folder / RECORD} names the base already; leave --base out")
    with TemporaryDirectory(prefix="rankloom-") as scratch:
        staged = Path(scratch) / "adapter"
        with rename_in_errors(staged, str(folder)):
            if has_record:
                draft = _stage_recorded(folder, staged, on_note)
            else:
                draft = _stage_foreign(folder, staged, name, base, on_note)
            return registry.publish(name, staged, draft)


def _stage_recorded(folder: Path, staged: Path, on_note: Callable[[str], None]) -> Draft:
    """Copy what a folder's own record lists to `staged`; return what it says, if they are still the same files."""
    try:
        record = Record.model_validate_json(find_files(folder, [RECORD])[RECORD].read_bytes())
        staged.mkdir()
        there = [name for name in record.files if (folder / name).exists()]  # check_files says what is missing
        for name, file in find_files(folder, there).items():
            shutil.copyfile(file, staged / name)
        check_files(staged, record)
    except (OSError, ValidationError, RegistryError) as error:
        raise RegistryError(
            f"{folder / RECORD} does not describe this folder: {' '.join(str(error).split())}; delete it to "
            f"publish the folder as one from elsewhere, without its scorecard"
        ) from None
    _note_others(folder, [RECORD, *record.files], on_note)
    return record.draft()


def _stage_foreign(folder: Path, staged: Path, name: str, base_id: str | None, on_note: Callable[[str], None]) -> Draft:
    """Write a PEFT folder that rankloom did not make to `staged`, plainly and with a probe; return its draft."""
    files = find_files(folder, (CONFIG, WEIGHTS))
    check_contents(folder, files)
    config = read_config(folder / CONFIG)
    base_id = base_id or config.get("base_model_name_or_path")
    if not isinstance(base_id, str) or not base_id:
        raise RegistryError(f"{folder / CONFIG} names no base_model_name_or_path; give --base")

    import torch  # a folder with a record needs none of these

    from rankloom.adapters.foreign import write_plain
    from rankloom.adapters.probe import check_probe, record_probe
    from rankloom.adapters.weights import load_adapter
    from rankloom.config.model import ModelConfig
    from rankloom.models import detect_quantization, load_base

    quantization = detect_quantization(ModelConfig(id=base_id))
    base = load_base(ModelConfig(id=base_id), quantization, device=torch.device("cpu"))
    for note in write_plain(base.model, folder, staged, base_id):
        on_note(note)
    _note_others(folder, files, on_note)
    model = load_adapter(base.model, staged)
    record_probe(model, base.tokenizer(PROBE_TEXT)["input_ids"], staged)
    check_probe(model, staged, quantization=base.quantization)  # an adapter that does nothing is refused here
    return Draft(
        method="dora" if config.get("use_dora") else "lora",
        base=BaseModelRef(id=base_id, fingerprint=base.fingerprint, quantization=quantization.type),
        servable="itself",
        trial={"name": name, "model": {"id": base_id}, "quantization": base.quantization},
        data_fingerprint=None,
        scorecard=None,
        versions=Versions.from_installed(),
    )


def _note_others(folder: Path, known: Collection[str], on_note: Callable[[str], None]) -> None:
    """Note which files stay behind; a card is written anew, so it is not missed."""
    if left := sorted(entry.name for entry in folder.iterdir() if entry.name not in (*known, CARD)):
        on_note(f"not read, and not published: {', '.join(left[:10])}{', ...' if left[10:] else ''}")
