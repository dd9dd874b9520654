"""Where a result was made: processor, threads, versions and commit. The same seed gives the same bits only there."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from systems import distributed
from utils import get_logger, is_main_process

PACKAGES = ("torch", "transformers", "numpy")
CAPABILITY = torch.backends.cpu.get_cpu_capability()  # "AVX2", "AVX512", ...
ROOT = Path(__file__).resolve().parents[1]


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a result row says of the machine, all JSON.

    device: the name of the GPU; or of the CPU, in brackets those of its instructions that torch uses: results differ by them.
    processes, and threads of each. versions: of torch, transformers, numpy.
    """
    return {
        "device": f"{processor()} ({CAPABILITY})" if torch.device(device).type == "cpu" else torch.cuda.get_device_name(device),
        "processes": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "git_commit": git_commit(),
    }


def described(where: dict[str, Any]) -> str:
    """What `machine` gives, in words."""
    threads = "1 thread" if where["threads"] == 1 else f"{where['threads']} threads"
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    processes = f"{where['processes']} processes of " if where["processes"] > 1 else ""
    commit = (where["git_commit"] or "unknown")[:7]
    return f"{where['device']}, {processes}{threads}; {versions}; commit {commit}"


def processor() -> str:
    """The CPU's model as Linux names it, elsewhere its architecture."""
    names = [line.partition(":")[2].strip() for line in _cpuinfo().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def has_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Whether torch uses instructions of the device for bfloat16.

    Without them a matrix product took 4.5 (AVX-512) to 40 times (AVX2) as long as in float32. oneDNN also answers yes where it
    only imitates them by AVX-512.
    """
    if torch.device(device).type != "cpu":
        return True
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return platform.machine() not in ("x86_64", "AMD64") or "avx512_bf16" in _cpuinfo()


def _cpuinfo() -> str:
    """What Linux says of the processor; nothing elsewhere."""
    listing = Path("/proc/cpuinfo")
    return listing.read_text(encoding="utf-8") if listing.exists() else ""


def warn_of_slow_bfloat16(setting: str, instead: str, device: torch.device) -> None:
    """One line where a setting asks for bfloat16 on a device without it."""
    if is_main_process() and not has_bfloat16(device):
        get_logger().warning(f"{setting}: on this processor torch takes several times as long with bfloat16; take {instead}")


def git_commit() -> str | None:
    """The commit of the code, with "+" where files differ from it; None outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
