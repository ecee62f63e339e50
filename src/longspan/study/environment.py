"""What this machine and installation are: written beside every result and shown by `longspan doctor`."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from longspan.foundation.errors import UserError
from longspan.foundation.extras import EXTRAS
from longspan.foundation.machine import ALLOCATOR, available_cores
from longspan.report.numbers import byte_size

PACKAGES = (
    "longspan", "torch", "numpy", "scipy", "tokenizers", "safetensors", "pydantic", "altair", "vl-convert-python",
    "mwparserfromhell", "rensa", "zstandard",
)  # fmt: skip


LITTLE_DISK = 2 * 2**30
"""Bytes free under which `doctor` says something."""


@functools.cache
def versions() -> Mapping[str, str]:
    """Versions of Python and of the packages that decide results."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "from source" if package == "longspan" else "missing"
    return found


def hardware() -> dict[str, str]:
    """Processor, cores, memory, GPUs, the number of torch threads, and which kernels the ops run as."""
    import torch

    facts = {
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(available_cores()),
        "memory": byte_size(_memory_bytes()),
        "torch threads": str(torch.get_num_threads()),
        "allocator": "tuned" if os.environ.get("GLIBC_TUNABLES") else "default",
        "kernels": _kernels()[0],
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        facts[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return facts


@functools.cache
def git_state(folder: Path | None = None) -> Mapping[str, str]:
    """Commit of the source tree and whether it has uncommitted changes; empty outside a checkout.

    Asked once a process: what it runs is what it imported, whatever is committed since.
    """
    folder = folder or Path(__file__).parent

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
        return result.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changes": "yes" if git("status", "--porcelain") else "none"}
    except (OSError, subprocess.SubprocessError):
        return {}


def devices(side_by_side: int = 1) -> list[str]:
    """The devices that jobs can run on: every CUDA device, else the CPU, once for each job at a time.

    Raises:
        UserError: several jobs at a time on GPUs, each of which takes one, or more of them than cores.
    """
    import torch

    found = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    cores = available_cores()
    if side_by_side > 1 and (found or side_by_side > cores):
        there = f"one job a GPU ({len(found)} here)" if found else f"at most one job a core ({cores} here)"
        raise UserError(f"--jobs {side_by_side}", there, "leave `--jobs` out" if found else f"use --jobs {cores}")
    return found or ["cpu"] * side_by_side


def doctor(runs: Path) -> list[tuple[str, str, str]]:
    """What works here: (topic, finding, advice), advice empty where nothing is to do."""
    rows = [(name, version, "") for name, version in versions().items() if name in ("python", "longspan", "torch")]
    facts = hardware()
    rows += [(name, value, "") for name, value in facts.items() if name not in ("allocator", "kernels")]
    rows.append(("device for jobs", ", ".join(devices()), ""))
    rows.append(("kernels", *_kernels()))
    rows.append(_bf16())
    rows.append(("allocator", facts["allocator"], "" if facts["allocator"] == "tuned" or sys.platform != "linux" else
                 "`longspan run` sets it by itself; for your own scripts: GLIBC_TUNABLES=" + ALLOCATOR))  # fmt: skip
    anchor = next(parent for parent in (runs.absolute(), *runs.absolute().parents) if parent.exists())
    free = shutil.disk_usage(anchor).free
    advice = "" if free > LITTLE_DISK else "free some space: quickstart needs 0.2 GiB"
    rows.append((f"disk under {runs}", f"{byte_size(free)} free", advice))
    for extra, (module, purpose) in EXTRAS.items():
        present = importlib.util.find_spec(module) is not None
        advice = "" if present else f"pip install 'longspan[{extra}]' brings {purpose}"
        rows.append((f"extra {extra}", "installed" if present else "missing", advice))
    return rows


def _kernels() -> tuple[str, str]:
    """What the ops run as where jobs run, and what to do where they cannot."""
    import torch

    from longspan.ops import kernels

    try:
        return kernels.described(torch.device("cuda" if torch.cuda.is_available() else "cpu")), ""
    except UserError as error:
        return f"none: {error.given}", error.fix


def _bf16() -> tuple[str, str, str]:
    import torch

    if torch.cuda.is_available():
        supported = torch.cuda.is_bf16_supported()
        return "bf16", "native" if supported else "not supported", "" if supported else "train with training.dtype=fp32"
    flags = _cpu_flags()
    native = bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    advice = "" if native else "train in fp32 on this CPU (the default): bf16 would be about 15 times slower"
    return "bf16", "native" if native else "emulated", advice


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return set(line.partition(":")[2].split())


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0
