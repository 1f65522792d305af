"""Describe the machine that a measurement was taken on: device, driver and versions."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
from pathlib import Path

import torch

import epsanet_fused as ef
from epsanet_fused.utils.device_info import cpu_model

# The columns of every CSV file that describe the machine.
MACHINE = (
    "device", "driver", "python", "torch", "triton", "cuda", "cudnn", "epsanet_fused", "threads",
)  # fmt: skip


def describe(device: torch.device) -> dict[str, str]:
    """Return the values of the columns MACHINE."""
    cuda = device.type == "cuda"
    values = (
        torch.cuda.get_device_name(device) if cuda else cpu_model(),
        query_smi("driver_version") if cuda else "",
        platform.python_version(),
        torch.__version__,
        version_of("triton"),
        torch.version.cuda or torch.version.hip or "" if cuda else "",
        str(torch.backends.cudnn.version() or "") if cuda else "",
        ef.__version__,
        str(torch.get_num_threads()),
    )
    return dict(zip(MACHINE, values, strict=True))


def version_of(package: str) -> str:
    """Return the version of an installed package, which is not imported; else ""."""
    if importlib.util.find_spec(package) is None:
        return ""
    names = importlib.metadata.packages_distributions().get(package, [])
    return importlib.metadata.version(names[0]) if names else "unknown"


def query_smi(field: str) -> str:
    """Ask nvidia-smi for a property of the first GPU; "" if it can't tell."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""


def unseen_gpu() -> str | None:
    """Return a line about an NVIDIA GPU of this machine that PyTorch does not see, or None."""
    if torch.cuda.is_available():
        return None
    name = query_smi("name")
    if not name and not any(Path("/proc/driver/nvidia/gpus").glob("*")):
        return None
    build = torch.version.cuda
    reason = (
        f"torch {torch.__version__} is built for CUDA {build}, but finds no usable driver or device"
        if build
        else f"torch {torch.__version__} is built without CUDA; install a CUDA build of PyTorch"
    )
    return f"This machine has an NVIDIA GPU ({name or 'unknown model'}) that isn't timed: {reason}"


def cache_bytes(device: torch.device) -> int:
    """Return the size of the device's last-level cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    kilobytes = [int(text[:-1]) for s in sizes if (text := s.read_text().strip()).endswith("K")]
    return max(kilobytes, default=32 * 1024) * 1024
