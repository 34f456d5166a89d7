"""The registry on a disk and on an S3 server: what is published, what is refused, what survives a crash and a race."""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from rankloom.errors import AdapterNotFoundError, ConfigError, RegistryError
from rankloom.registry import Draft, Record, Registry
from rankloom.registry import storage as storage_module
from rankloom.registry.scorecard import Extraction, Measures, Proportion, Scorecard
from rankloom.registry.store import parse_ref

MEASURES = Measures(num_rows=40, loss=0.25, perplexity=1.28, accuracy=Proportion(value=0.9, low=0.8, high=0.95))
SCORECARD = Scorecard(
    result=MEASURES,
    base=MEASURES.model_copy(update={"loss": 2.5}),
    extraction=Extraction(rank=8, energy=0.7, trained=MEASURES),
    trainable_parameters=1000,
    adapter_bytes=4096,
    peak_memory_bytes=2**30,
    steps=10,
    train_tokens=5000,
    train_s=12.5,
    tokens_per_s=400.0,
    device="cpu",
)
FIELDS: dict[str, Any] = {
    "method": "lora",
    "base": {"id": "org/tiny", "fingerprint": "sha256:" + "0" * 64, "quantization": "none"},
    "servable": "itself",
    "trial": {"name": "a", "method": {"type": "lora", "rank": 4}},
    "data_fingerprint": "sha256:1",
    "scorecard": SCORECARD,
    "versions": {"rankloom": "0.1", "torch": "2", "transformers": "5", "peft": "0"},
}


def drafted(**changes: Any) -> Draft:
    return Draft.model_validate(FIELDS | changes)


DRAFT = drafted()

# how a child process begins: the draft comes without its scorecard, on the command line
CHILD = """
import sys, time
from pathlib import Path
from rankloom.registry import Draft, Registry, storage
root, folder, draft = sys.argv[1], Path(sys.argv[2]), Draft.model_validate_json(sys.argv[3])
"""


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small folder in PEFT's format."""

    def make(name: str = "adapter", seed: int = 0, size: int = 8) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
        weights = np.random.default_rng(seed).normal(size=(4, size)).astype(np.float32)
        save_file({"layer.lora_A.weight": weights}, folder / "adapter_model.safetensors")
        return folder

    return make


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3_root(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh bucket's URL; the environment points every S3 client at the local server."""
    import boto3

    for key, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    bucket = f"bucket-{time.time_ns()}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}/some/registry"


@pytest.fixture(params=["local", "s3"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    return Registry(tmp_path / "store" if request.param == "local" else request.getfixturevalue("s3_root"))


def child(script: str, root: str | Path, folder: Path, **options: Any) -> subprocess.Popen[str]:
    draft = json.dumps(FIELDS | {"scorecard": None})
    return subprocess.Popen(
        [sys.executable, "-c", CHILD + script, str(root), str(folder), draft],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def everything(root: Path) -> set[str]:
    """Every file below a local root but lock files, which stay."""
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path.name != ".lock"}


# --- publish, find, promote: the same on both storages


def test_publish_gives_numbers_and_keeps_everything(registry: Registry, adapter: Callable[..., Path]) -> None:
    first = registry.publish("bank", adapter("one"), DRAFT)
    second = registry.publish("bank", adapter("two", seed=1), drafted(lineage={"run": "r7", "parent": "bank@1"}))
    assert (first.ref, second.ref) == ("bank@1", "bank@2")
    assert set(first.files) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert first.files["adapter_model.safetensors"] != second.files["adapter_model.safetensors"]
    assert registry.get("bank@1") == first  # everything survives the way to disk and back
    assert registry.get("bank@2").lineage.run == "r7"
    assert registry.get("bank").scorecard == SCORECARD
    assert [r.ref for r in registry.list()] == ["bank@1", "bank@2"]
    assert [r.ref for r in registry.list("bank")] == ["bank@1", "bank@2"]
    assert registry.names() == ["bank"]
    assert first.created.utcoffset().total_seconds() == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("first", ["secret", "publish"])
def test_the_registrys_secret_is_in_no_adapters_way(
    registry: Registry, adapter: Callable[..., Path], first: str
) -> None:
    known = registry.secret() if first == "secret" else None
    assert registry.publish("secret", adapter(), DRAFT).ref == "secret@1"
    assert (known or registry.secret()) == registry.secret()
    assert registry.names() == ["secret"]


def test_refs_lead_to_champion_latest_alias_and_number(registry: Registry, adapter: Callable[..., Path]) -> None:
    folder = adapter()
    for _ in range(3):
        registry.publish("bank", folder, DRAFT)
    assert registry.get("bank").version == 3
    registry.promote("bank@1")
    registry.promote("bank@2", "canary")
    got = {ref: registry.get(ref).version for ref in ("bank", "bank@champion", "bank@canary", "bank@latest", "bank@3")}
    assert got == {"bank": 1, "bank@champion": 1, "bank@canary": 2, "bank@latest": 3, "bank@3": 3}
    assert registry.aliases("bank") == {"champion": 1, "canary": 2}
    assert registry.promote("bank@canary").version == 2  # an alias can be promoted to another
    assert registry.promote("bank").version == 3  # a bare name is the latest here, not the champion itself


def test_rollback_walks_back_and_history_is_kept(registry: Registry, adapter: Callable[..., Path]) -> None:
    folder = adapter()
    for _ in range(3):
        registry.publish("bank", folder, DRAFT)
    for version in (1, 2, 3, 3):
        registry.promote(f"bank@{version}")
    assert registry.rollback("bank").version == 2
    assert registry.rollback("bank").version == 1
    with pytest.raises(RegistryError, match="nothing to roll back to; promote a version: 1, 2, 3"):
        registry.rollback("bank")
    registry.promote("bank@3")
    assert registry.rollback("bank").version == 1  # where it pointed before that promotion
    moves = [(move.action, move.version) for move in registry.history("bank")["champion"]]
    assert moves == [
        ("promote", 1), ("promote", 2), ("promote", 3), ("rollback", 2), ("rollback", 1),
        ("promote", 3), ("rollback", 1),
    ]  # fmt: skip
    with pytest.raises(AdapterNotFoundError, match="has no alias 'canary'; it has champion"):
        registry.rollback("bank", "canary")


def test_rm_refuses_a_champion_and_never_gives_a_number_again(registry: Registry, adapter: Callable[..., Path]) -> None:
    folder = adapter()
    for _ in range(3):
        registry.publish("bank", folder, DRAFT)
    registry.promote("bank@1")
    registry.promote("bank@2")
    with pytest.raises(RegistryError, match="bank@2 is champion"):
        registry.rm("bank@2")
    with pytest.raises(RegistryError, match="name the version"):
        registry.rm("bank")
    registry.rm("bank@3")
    assert registry.versions("bank") == [1, 2]
    with pytest.raises(AdapterNotFoundError, match="bank has no version 3; it has 1, 2"):
        registry.get("bank@3")
    assert registry.publish("bank", folder, DRAFT).version == 4
    registry.rm("bank@2", force=True)
    with pytest.raises(AdapterNotFoundError, match="champion points to version 2, which was removed"):
        registry.get("bank")
    assert registry.rollback("bank").version == 1
    assert registry.get("bank").version == 1


def test_rollback_passes_over_removed_versions(tmp_path: Path, adapter: Callable[..., Path]) -> None:
    registry, folder = Registry(tmp_path / "store"), adapter()
    for version in (1, 2, 3):
        registry.publish("bank", folder, DRAFT)
        registry.promote(f"bank@{version}")
    registry.rm("bank@2")
    assert registry.rollback("bank").version == 1


def test_fetch_gives_a_verified_copy(registry: Registry, adapter: Callable[..., Path], tmp_path: Path) -> None:
    source = adapter()
    record = registry.publish("bank", source, DRAFT)
    fetched = registry.fetch("bank@1", tmp_path / "deep" / "copy")
    assert {f.name for f in fetched.iterdir()} == set(record.files) | {"record.json"}
    weights = "adapter_model.safetensors"
    assert (fetched / weights).read_bytes() == (source / weights).read_bytes()
    assert Record.model_validate_json((fetched / "record.json").read_bytes()) == record
    with pytest.raises(RegistryError, match="not an empty folder"):
        registry.fetch("bank@1", fetched)
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["copy"]


def test_a_fetched_folder_can_be_published_again(
    registry: Registry, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    first = registry.publish("bank", adapter(), DRAFT)
    copy = registry.fetch("bank@1", tmp_path / "copy")
    second = registry.publish("other", copy, first.draft())
    assert second.ref == "other@1"
    assert second.lineage.parent == "bank@1"
    assert second.scorecard == SCORECARD
    registry.verify("other@1")


def test_the_model_card_is_hub_style(registry: Registry, adapter: Callable[..., Path], tmp_path: Path) -> None:
    registry.publish("bank", adapter(), drafted(base=FIELDS["base"] | {"quantization": "nf4"}))
    card = (registry.fetch("bank", tmp_path / "copy") / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "peft", "base_model": "org/tiny", "tags": ["base_model:adapter", "lora", "rankloom"],
    }  # fmt: skip
    assert "| loss | 0.2500 | 2.5000 |" in body
    assert "| accuracy [95 %] | 90.0 % [80.0, 95.0] | 90.0 % [80.0, 95.0] |" in body
    assert "| energy kept at rank 8 | 70.0 % |" in body
    code = body.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "load_in_4bit=True" in code


def test_a_card_names_no_hub_id_for_a_local_base(tmp_path: Path, adapter: Callable[..., Path]) -> None:
    registry = Registry(tmp_path / "store")
    for base in ("builtin:smollm2", str(tmp_path / "model")):
        registry.publish("bank", adapter(base.rsplit("/")[-1]), drafted(base=FIELDS["base"] | {"id": base}))
        card = (tmp_path / "store" / "bank" / "1" / "README.md").read_text()
        assert "base_model" not in yaml.safe_load(card.split("---\n")[1])
        assert "path/to/the/base" in card


# --- what verify notices


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return apply


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_bytes(lambda data: data[:-8]), r"has \d+ bytes; its record says"),
        (_bytes(lambda data: data[:-1] + bytes([data[-1] ^ 1])), "another checksum"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json is missing"),
        (lambda folder: (folder / "evil.pkl").write_bytes(b"x"), "evil.pkl is not in the record"),
        (lambda folder: (folder / ".hidden").write_bytes(b"x"), ".hidden is not in the record"),
        (lambda folder: (folder / "sub").mkdir(), "sub is not in the record"),
    ],
    ids=["truncated", "one bit", "missing", "pickle", "hidden", "subfolder"],
)
def test_verify_and_fetch_notice(
    tmp_path: Path, adapter: Callable[..., Path], damage: Callable[[Path], None], reason: str
) -> None:
    registry = Registry(tmp_path / "store")
    registry.publish("bank", adapter(), DRAFT)
    registry.verify("bank")
    damage(tmp_path / "store" / "bank" / "1")
    with pytest.raises(RegistryError, match=reason):
        registry.verify("bank")
    with pytest.raises(RegistryError, match=r"bank@1 is broken"):
        registry.fetch("bank", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert not list(tmp_path.glob(".fetching-*"))


def test_verify_notices_a_link_in_place_of_a_file(tmp_path: Path, adapter: Callable[..., Path]) -> None:
    registry = Registry(tmp_path / "store")
    registry.publish("bank", adapter(), DRAFT)
    weights = tmp_path / "store" / "bank" / "1" / "adapter_model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RegistryError, match="symbolic link"):
        registry.verify("bank")
    with pytest.raises(RegistryError, match="symbolic link"):
        registry.fetch("bank", tmp_path / "copy")


def test_a_size_that_no_file_has_is_no_record(tmp_path: Path, adapter: Callable[..., Path]) -> None:
    registry = Registry(tmp_path / "store")
    registry.publish("bank", adapter(), DRAFT)
    file = tmp_path / "store" / "bank" / "1" / "record.json"
    tree = json.loads(file.read_text())
    tree["files"]["adapter_config.json"]["bytes"] = 10**400
    file.write_text(json.dumps(tree))
    with pytest.raises(RegistryError, match=r"is not a record of this rankloom: files\.adapter_config\.json\.bytes"):
        registry.get("bank")


def test_verify_reads_the_header_even_where_the_checksum_holds(tmp_path: Path, adapter: Callable[..., Path]) -> None:
    """A record that was forged to fit a broken file does not pass."""
    registry = Registry(tmp_path / "store")
    registry.publish("bank", adapter(), DRAFT)
    folder = tmp_path / "store" / "bank" / "1"
    from rankloom.registry.checks import describe

    for name, data, reason in (
        ("adapter_model.safetensors", b"\x80\x04K\x01.", "corrupt or truncated"),
        ("adapter_config.json", b"[" * 100_000, "not JSON"),
        ("adapter_config.json", b"{}", "no peft_type"),
    ):
        (folder / name).write_bytes(data)
        tree = json.loads((folder / "record.json").read_text())
        tree["files"][name] = describe(folder / name).model_dump()
        (folder / "record.json").write_text(json.dumps(tree))
        with pytest.raises(RegistryError, match=reason):
            registry.verify("bank")


def test_s3_verify_notices_damage(s3_root: str, adapter: Callable[..., Path]) -> None:
    import boto3

    registry = Registry(s3_root)
    registry.publish("bank", adapter(), DRAFT)
    registry.verify("bank")
    bucket, prefix = s3_root.removeprefix("s3://").split("/", 1)
    client = boto3.client("s3")
    client.put_object(Bucket=bucket, Key=f"{prefix}/bank/1/extra.json", Body=b"{}")
    with pytest.raises(RegistryError, match=r"not in the record: extra\.json"):
        registry.verify("bank")
    client.delete_object(Bucket=bucket, Key=f"{prefix}/bank/1/extra.json")
    client.put_object(Bucket=bucket, Key=f"{prefix}/bank/1/adapter_model.safetensors", Body=b"short")
    with pytest.raises(RegistryError, match="has 5 bytes"):
        registry.verify("bank")


def test_a_damaged_record_is_reported_and_hides_no_other(
    tmp_path: Path, adapter: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    registry, folder = Registry(tmp_path / "store"), adapter()
    for name in ("a", "b", "c"):
        registry.publish(name, folder, DRAFT)
    (tmp_path / "store/a/1/record.json").write_text('{"name": "a"')
    (tmp_path / "store/b/1/record.json").write_bytes((tmp_path / "store/c/1/record.json").read_bytes())
    assert [r.ref for r in registry.list()] == ["c@1"]
    assert "is not a record of this rankloom" in caplog.text
    with pytest.raises(RegistryError, match=r"is the record of c@1"):
        registry.get("b")
    (tmp_path / "store/c/aliases.json").write_text("[]")
    with pytest.raises(RegistryError, match=r"aliases\.json is damaged"):
        registry.get("c")


# --- what publish refuses


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
        (lambda f: (f / "adapter_model.bin").write_bytes(b"x"), r"adapter_model\.bin may hold a pickle"),
        (lambda f: (f / "optimizer.PT").write_bytes(b"x"), r"optimizer\.PT may hold a pickle"),
        (lambda f: (f / "x.pkl").write_bytes(b"x"), "may hold a pickle"),
        (lambda f: (f / "run.py").write_text("x"), r"'run\.py' does not belong"),
        (lambda f: (f / ".env.json").write_text("x"), "does not belong"),
        (lambda f: (f / "new\nline.json").write_text("x"), "does not belong"),
        (lambda f: (f / "sub").mkdir(), "sub/ is a subfolder"),
        (lambda f: (f / "link.json").symlink_to("/etc/passwd"), "symbolic link"),
        (lambda f: os.mkfifo(f / "pipe.json"), "not a regular file"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "not JSON"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "no peft_type"),
        (_bytes(lambda data: data[:-1]), "corrupt or truncated"),
        (_bytes(lambda data: b""), "corrupt or truncated"),  # noqa: ARG005
        (_bytes(lambda data: b"\xff" * 64), "corrupt or truncated"),  # noqa: ARG005
    ],
)
def test_publish_refuses(
    tmp_path: Path, adapter: Callable[..., Path], spoil: Callable[[Path], None], reason: str
) -> None:
    registry, folder = Registry(tmp_path / "store"), adapter()
    spoil(folder)
    with pytest.raises(RegistryError, match=reason):
        registry.publish("bank", folder, DRAFT)
    assert registry.list() == []
    assert everything(tmp_path / "store") == set()


def test_publish_refuses_what_is_no_folder(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "store")
    with pytest.raises(RegistryError, match="no such folder"):
        registry.publish("bank", tmp_path / "nowhere", DRAFT)


BAD_NAMES = ["", ".", "..", "../x", "/etc", "a/b", "a\\b", "A", "a\0b", "a\n", "é", "-a", "a" * 129, "a b", "%2e%2e"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_are_confined(tmp_path: Path, adapter: Callable[..., Path], name: str) -> None:
    registry, folder = Registry(tmp_path / "store"), adapter()
    for call in (
        lambda: registry.publish(name, folder, DRAFT),
        lambda: registry.get(name),
        lambda: registry.get(f"{name}@1"),
        lambda: registry.rollback(name),
        lambda: registry.versions(name),
        lambda: registry.history(name),
    ):
        with pytest.raises(ConfigError, match=r"adapter name .*: allowed are 1 to 128 lower-case letters") as caught:
            call()
        assert len(str(caught.value)) < 300
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("selector", ["", "0", "01", "-1", "../x", "a/b", "a@b", "a\0", "9" * 10, "x" * 129])
def test_selectors_are_confined(selector: str) -> None:
    with pytest.raises(ConfigError, match=r"after the @ comes a version \(1, 2, \.\.\.\) or an alias"):
        parse_ref(f"bank@{selector}")


@pytest.mark.parametrize("alias", ["7", "latest", "../x", "", "Champion"])
def test_aliases_are_confined(tmp_path: Path, adapter: Callable[..., Path], alias: str) -> None:
    registry = Registry(tmp_path / "store")
    registry.publish("bank", adapter(), DRAFT)
    with pytest.raises(ConfigError, match="alias"):
        registry.promote("bank@1", alias)
    assert registry.aliases("bank") == {}


def test_no_adapter_is_called_as_the_base_is(tmp_path: Path, adapter: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="'base': it means the base without an adapter"):
        Registry(tmp_path / "store").publish("base", adapter(), DRAFT)
    assert not Registry(tmp_path / "store").names()


def test_what_is_not_there_is_named_with_its_neighbours(registry: Registry, adapter: Callable[..., Path]) -> None:
    with pytest.raises(AdapterNotFoundError, match="it holds none"):
        registry.get("bank")
    folder = adapter()
    registry.publish("bank-intents", folder, DRAFT)
    registry.promote("bank-intents")
    with pytest.raises(AdapterNotFoundError, match="did you mean bank-intents"):
        registry.get("bank-intent")
    with pytest.raises(AdapterNotFoundError, match="it holds bank-intents"):
        registry.promote("zzz")
    with pytest.raises(AdapterNotFoundError, match="did you mean bank-intents@champion"):
        registry.get("bank-intents@champoin")
    with pytest.raises(AdapterNotFoundError, match="it holds bank-intents"):
        registry.list("zzz")
    assert registry.names() == ["bank-intents"]  # asking for zzz left no folder


# --- storage that fails


def test_a_root_that_is_a_file(tmp_path: Path, adapter: Callable[..., Path]) -> None:
    (tmp_path / "store").write_text("")
    registry, folder = Registry(tmp_path / "store"), adapter()
    for call in (registry.list, lambda: registry.publish("bank", folder, DRAFT)):
        with pytest.raises(RegistryError, match="Not a directory"):
            call()


@pytest.mark.parametrize("root", ["nope://x/y", "s3://", ""])
def test_a_root_that_is_no_place(root: str) -> None:
    with pytest.raises(ConfigError, match=rf"registry:? '?{root}"):
        Registry(root)


def test_a_bucket_that_is_not_there(s3_root: str, adapter: Callable[..., Path]) -> None:
    registry, folder = Registry(f"{s3_root.split('/some')[0]}-gone/registry"), adapter()
    with pytest.raises(RegistryError, match=r"bucket|Bucket"):
        registry.publish("bank", folder, DRAFT)
    for call in (registry.list, lambda: registry.get("bank")):
        with pytest.raises(RegistryError, match="there is no bucket"):
            call()


def test_file_urls_are_local(tmp_path: Path, adapter: Callable[..., Path]) -> None:
    Registry(f"file://{tmp_path}/store").publish("bank", adapter(), DRAFT)
    assert Registry(tmp_path / "store").get("bank").version == 1


REFUSED = """
from rankloom.errors import RegistryError
try:
    Registry(root).publish("bank", folder, draft)
except RegistryError as error:
    print(error)
else:
    sys.exit("was published")
"""


def test_a_file_that_can_not_be_written_whole(tmp_path: Path, adapter: Callable[..., Path]) -> None:
    """The limit on a file's size stands in for a full disk: writing fails in the middle."""
    folder = adapter(size=50_000)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    process = child(REFUSED, tmp_path / "store", folder, preexec_fn=limit)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "File too large" in out
    assert "nothing was published" in out
    assert everything(tmp_path / "store") == set()
    assert not list((tmp_path / "store").rglob(".publishing-*"))


def _can_mount() -> bool:
    return subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not _can_mount(), reason="needs the right to mount a file system")
@pytest.mark.parametrize(
    ("mount", "reason"), [("size=200k", "No space left on device"), ("ro", "Read-only file system")]
)
def test_a_full_and_a_read_only_disk(tmp_path: Path, adapter: Callable[..., Path], mount: str, reason: str) -> None:
    (tmp_path / "disk").mkdir()
    script = REFUSED + "print(sorted(p.name for p in Path(root).rglob('*') if p.name != '.lock'))"
    draft = json.dumps(FIELDS | {"scorecard": None})
    shell = f'mount -t tmpfs -o {mount} none "$1" && shift && exec "$@"'
    root, folder = tmp_path / "disk" / "store", adapter(size=50_000)
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", shell, "sh", str(tmp_path / "disk"),
         sys.executable, "-c", CHILD + script, str(root), str(folder), draft],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    message, left = done.stdout.strip().splitlines()
    assert reason in message
    assert left in ("[]", "['bank']")


# --- crashes and races, with real processes

PUBLISH_THREE = """
for _ in range(3):
    Registry(root).publish("bank", folder, draft)
"""


def test_processes_that_publish_at_once(registry: Registry, adapter: Callable[..., Path]) -> None:
    folder = adapter()
    processes = [child(PUBLISH_THREE, registry.root, folder) for _ in range(3)]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    versions = registry.versions("bank")
    assert len(versions) == 9
    if not registry.root.startswith("s3:"):  # there, two that collide both give way
        assert versions == list(range(1, 10))
    for version in versions:
        registry.verify(f"bank@{version}")


PROMOTE_MANY = """
registry = Registry(root)
for turn in range(10):
    registry.promote(f"bank@{1 + (turn + int(folder.name)) % 3}")
"""


def test_processes_that_promote_at_once(tmp_path: Path, adapter: Callable[..., Path]) -> None:
    registry, folder = Registry(tmp_path / "store"), adapter()
    for _ in range(3):
        registry.publish("bank", folder, DRAFT)
    processes = [child(PROMOTE_MANY, registry.root, Path(str(start))) for start in range(3)]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    moves = registry.history("bank")["champion"]
    assert len(moves) >= 10
    assert all(a.version != b.version and a.at <= b.at for a, b in itertools.pairwise(moves))
    assert registry.get("bank").version == moves[-1].version


HANG_BEFORE_RENAME = """
storage._sync = lambda path: (print("staged", flush=True), time.sleep(600))
Registry(root).publish("bank", folder, draft)
"""


def test_a_publisher_killed_in_the_middle(tmp_path: Path, adapter: Callable[..., Path]) -> None:
    registry, folder = Registry(tmp_path / "store"), adapter()
    registry.publish("bank", folder, DRAFT)
    process = child(HANG_BEFORE_RENAME, registry.root, folder)
    assert process.stdout
    assert process.stdout.readline() == "staged\n"
    leftover = list((tmp_path / "store" / "bank").glob(".publishing-*/record.json"))
    assert len(leftover) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [r.ref for r in registry.list()] == ["bank@1"]  # the leftover is invisible
    assert registry.publish("bank", folder, DRAFT).version == 2
    assert not list((tmp_path / "store" / "bank").glob(".publishing-*"))
    registry.verify("bank@2")


def test_a_living_publisher_is_waited_for(
    tmp_path: Path, adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, folder = Registry(tmp_path / "store"), adapter()
    process = child(HANG_BEFORE_RENAME, registry.root, folder)
    assert process.stdout
    assert process.stdout.readline() == "staged\n"
    monkeypatch.setattr(storage_module, "LOCK_TIMEOUT_S", 0.2)
    with pytest.raises(RegistryError, match="another process has held its lock"):
        registry.publish("bank", folder, DRAFT)
    assert list((tmp_path / "store" / "bank").glob(".publishing-*/record.json"))  # its files were left alone
    assert registry.publish("other", folder, DRAFT).version == 1  # and other names are free
    process.kill()
    process.wait()


HANG_IN_UPLOAD = """
copy = storage.shutil.copyfileobj
def hang(source, target, size):
    copy(source, target, size)
    target.close()
    print("uploaded", flush=True)
    time.sleep(600)
storage.shutil.copyfileobj = hang
Registry(root).publish("bank", folder, draft)
"""


def test_an_uploader_killed_in_the_middle(
    s3_root: str, adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    registry, folder = Registry(s3_root), adapter()
    process = child(HANG_IN_UPLOAD, s3_root, folder)
    assert process.stdout
    assert process.stdout.readline() == "uploaded\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert registry.list() == []
    with pytest.raises(AdapterNotFoundError):
        registry.get("bank")
    assert registry.publish("bank", folder, DRAFT).version == 2  # number 1 stays claimed
    registry.verify("bank@2")

    def keys() -> set[str]:
        bucket, prefix = s3_root.removeprefix("s3://").split("/", 1)
        found = boto3.client("s3").list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/bank/1/")
        return {o["Key"].rsplit("/", 1)[-1].split("-")[0] for o in found.get("Contents", [])}

    assert keys() - {""} == {".claim", "README.md"}  # so soon it might only be slow
    monkeypatch.setattr(storage_module, "ABANDONED_AFTER", storage_module.timedelta(seconds=-1))
    assert registry.publish("bank", folder, DRAFT).version == 3
    assert keys() - {""} == {".claim"}


def test_an_upload_that_fails_leaves_nothing(
    s3_root: str, adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, folder = Registry(s3_root), adapter()
    write = storage_module.ObjectStorage.write

    def fail(self: storage_module.ObjectStorage, path: str, data: bytes) -> None:
        if path.endswith("record.json"):
            raise OSError("connection reset")
        write(self, path, data)

    with monkeypatch.context() as patched:
        patched.setattr(storage_module.ObjectStorage, "write", fail)
        with pytest.raises(RegistryError, match="connection reset; nothing was published"):
            registry.publish("bank", folder, DRAFT)
    assert registry.list() == []
    assert registry._storage.list_files("bank/1") == []
    registry.publish("bank", folder, DRAFT)
    registry.verify("bank")


def test_a_claimed_number_is_left_to_its_claimant(s3_root: str, adapter: Callable[..., Path]) -> None:
    registry = Registry(s3_root)
    registry._storage.write("bank/1/.claim-another", b"")
    staged = adapter()
    (staged / "record.json").write_text("{}")
    assert registry._storage.commit(staged, "bank", 1) is False
    assert registry.list() == []
    assert registry._storage.commit(staged, "bank", 2) is True


def test_the_registry_knows_no_torch() -> None:
    script = "import sys, rankloom.registry; print({'torch', 'transformers', 'peft', 'ray'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "set()"
