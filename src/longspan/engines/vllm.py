"""Starts, watches and stops `vllm serve` out of an environment of its own, and asks it as any other server.

vLLM wants its own torch, so it is never imported here: all that is known of it is a Python that can start it.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from longspan.engines.base import LargestBatch
from longspan.engines.openai import OpenAIEngine
from longspan.engines.opening import Described
from longspan.engines.server import Server
from longspan.engines.source import VllmArguments
from longspan.foundation.errors import MachineError, UserError
from longspan.foundation.progress import Progress, Report
from longspan.models.interchange import FETCHED, resolve

VARIABLE = "LONGSPAN_VLLM"
POLL_SECONDS = 0.5
STOP_SECONDS = 20.0
"""Seconds between asking the server to end and ending it."""
TAIL, MOST_LINES = 1_500, 400
"""Characters of its log that an error shows, of so many last lines."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_METRIC = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>[^}]*)\})?\s+(?P<value>[-+\w.]+)$", re.M)


class Child:
    """A server process of our own, which ends with us whatever happens.

    Attributes:
        log: the file that its output goes to.
    """

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        """Start it in a group of its own, so that Ctrl-C reaches it through us only."""
        self.log = log
        with log.open("wb") as output:
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **environment},
                    start_new_session=True,
                    preexec_fn=_die_with_parent() if sys.platform == "linux" else None,
                )
            except OSError as error:
                raise UserError(
                    f"{command[0]} cannot be started: {error.strerror}",
                    "the Python of an environment with vLLM",
                    f"mend `arguments.python`, or the environment variable {VARIABLE}",
                ) from None

    @property
    def ended(self) -> int | None:
        """Its exit code, None while it runs."""
        return self._process.poll()

    def tail(self) -> str:
        """The last lines that it wrote, those about errors if there are any."""
        with self.log.open(errors="replace") as file:
            lines = deque(file, MOST_LINES)
        errors = [line for line in lines if re.search(r"\w*(Error|Exception)\b.*:", line)]
        return "".join(dict.fromkeys(errors or lines)).strip()[-TAIL:]

    def last_words(self) -> str:
        """How it ended, if it did."""
        if self.ended is None:
            return ""
        return f"; vLLM ended with code {self.ended} (log: {self.log}); its last words:\n{self.tail()}"

    def stop(self) -> None:
        """End it and all that it started."""
        for number, patience in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                break
            try:
                self._process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
        self._process.poll()


class VllmEngine(OpenAIEngine):
    """A model behind a vLLM of our own.

    Attributes:
        child: the server's process.
    """

    child: Child

    def close(self) -> None:
        """Stop the server."""
        try:
            super().close()
        finally:
            self.child.stop()
            shutil.rmtree(self.child.log.parent, ignore_errors=True)

    def largest_batch(self, context: int) -> LargestBatch | None:
        """See `Engine.largest_batch`; by the room in the server's cache, which it says itself."""
        said = self.metrics()
        room = said.get("cache_blocks", 0.0) * said.get("cache_block_tokens", 0.0)
        return LargestBatch(int(room // context)) if room else None

    def metrics(self) -> dict[str, float]:
        """What the server says of its cache: blocks, tokens per block, share in use, prefix look-ups and hits."""
        return read_metrics(str(self.server.get("/metrics") or ""))


def start_vllm(found: Described, fingerprint: str, arguments: VllmArguments, device: str, report: Report) -> VllmEngine:
    """Start vLLM with a model and wait until it answers.

    Args:
        found: the model.
        fingerprint: of all that determines its answers but vLLM's version, which is added.
        arguments: how it is served and asked.
        device: `cuda:N`, which it alone sees; or `cpu`.
        report: told of every second that it takes.

    Raises:
        UserError: no environment with vLLM is named, or it has none.
        MachineError: the server ended while it started (with the last lines of its log), or took too long.
    """
    source = found.source
    assert source.pretrained is not None
    python = find_python(arguments)
    folder = resolve(source.pretrained, source.revision, fetched=FETCHED)
    port, name = free_port(), source.label
    flags: dict[str, Any] = {
        "served-model-name": name,
        "dtype": DTYPES[source.dtype],
        "host": "127.0.0.1",
        "port": port,
        **({"max-model-len": found.context_limit} if found.context_limit else {}),
        **({"hf-overrides": _overrides(found)} if source.rope_scaling else {}),
        **arguments.serve,
    }
    script = python.with_name("vllm")
    start = [str(script)] if script.is_file() else [str(python), "-m", "vllm.entrypoints.cli.main"]
    command = [*start, "serve", str(folder), *_flags(flags)]
    seen = {"CUDA_VISIBLE_DEVICES": device.partition(":")[2]} if device.startswith("cuda:") else {}
    log = Path(tempfile.mkdtemp(prefix="longspan-vllm-")) / "server.log"
    child = Child(command, {"HF_HUB_OFFLINE": "1", **seen, **arguments.environment}, log)
    try:
        server = Server(f"http://127.0.0.1:{port}", arguments, what=name)
        server.last_words = child.last_words
        wait_until_healthy(child, server, arguments.start_timeout, report)
        version = server.get("/version")
        engine = VllmEngine(
            server.url,
            name,
            found.tokenizer,
            markers=found.markers,
            fingerprint=f"{fingerprint}-vllm-{version.get('version') if isinstance(version, dict) else ''}",
            arguments=arguments,
            prompting=found.prompting(),
            shape=found.shape,
            itemsize=4 if source.dtype == "fp32" else 2,
            name=name,
            server=server,
        )
    except BaseException:
        # Ctrl-C while it starts leaves no process behind either.
        child.stop()
        raise
    engine.child = child
    return engine


def find_python(arguments: VllmArguments) -> Path:
    """The Python of vLLM's environment.

    Raises:
        UserError: none is named, or there is none.
    """
    named = arguments.python or os.environ.get(VARIABLE)
    fix = (
        "python -m venv vllm-env && vllm-env/bin/pip install vllm, then set "
        f"`arguments: {{python: vllm-env}}` or {VARIABLE}=vllm-env"
    )
    if not named:
        raise UserError("the engine vllm, and no environment with vLLM is named", "a folder, or a Python in it", fix)
    path = Path(named).expanduser()
    path = path / "bin" / "python" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{named} holds no Python", "the folder of a virtual environment, or a Python in it", fix)
    return path.absolute()


def wait_until_healthy(child: Child, server: Server, patience: float, report: Report) -> None:
    """Wait for the first good answer, saying how long it takes and what the server writes.

    Raises:
        MachineError: it ended, or took longer than `patience` seconds.
    """
    began = time.monotonic()
    while (waited := time.monotonic() - began) < patience:
        if child.ended is not None:
            raise MachineError(
                f"vLLM ended with code {child.ended} while it started; its last lines:\n{child.tail()}",
                "a model and flags that vLLM can serve",
                f"mend `arguments.serve` (the whole log is {child.log})",
            )
        report(Progress("start vllm", waited, None, "s"))
        if server.is_healthy():
            return
        time.sleep(POLL_SECONDS)
    raise MachineError(
        f"vLLM did not answer in {patience:.0f} s; its last lines:\n{child.tail()}",
        "a server that starts in `arguments.start_timeout` seconds",
        f"raise it (the whole log is {child.log})",
    )


def read_metrics(text: str) -> dict[str, float]:
    """The cache's numbers among a server's metrics; those that it does not have are left out."""
    wanted = {
        "vllm:kv_cache_usage_perc": "cache_share_in_use",
        "vllm:gpu_cache_usage_perc": "cache_share_in_use",
        "vllm:prefix_cache_queries_total": "prefix_tokens_asked",
        "vllm:prefix_cache_hits_total": "prefix_tokens_found",
    }
    found: dict[str, float] = {}
    for line in _METRIC.finditer(text):
        name, labels = line["name"], dict(re.findall(r'(\w+)="([^"]*)"', line["labels"] or ""))
        if name in wanted:
            found[wanted[name]] = found.get(wanted[name], 0.0) + float(line["value"])
        elif name == "vllm:cache_config_info":
            for label, ours in (("num_gpu_blocks", "cache_blocks"), ("block_size", "cache_block_tokens")):
                if labels.get(label, "").isdigit():
                    found[ours] = float(labels[label])
    return found


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _flags(flags: Mapping[str, Any]) -> list[str]:
    """`{a: 1, b: true, c: false}` as `--a 1 --b --no-c`."""
    words = []
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{name}")
        else:
            words += [f"--{name}", str(value)]
    return words


def _overrides(found: Described) -> str:
    config = found.config.get_text_config(decoder=True)
    return json.dumps(
        {"rope_parameters": config.rope_parameters, "max_position_embeddings": config.max_position_embeddings}
    )


def _die_with_parent() -> Callable[[], None]:
    """Ask Linux to end the child when this process dies, even by a signal that it cannot catch."""
    libc = ctypes.CDLL(None, use_errno=True)

    def ask() -> None:
        libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

    return ask
