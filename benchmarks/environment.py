"""Describe the machine that a measurement was taken on: device, driver and versions."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import epsanet_fused as ef
from epsanet_fused.utils.device_info import cpu_model

SMI_FIELDS = (
    "name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm",
    "clocks.max.mem", "power.limit", "temperature.gpu", "pstate", "persistence_mode",
    "mig.mode.current",
)  # fmt: skip


def describe(device: torch.device) -> dict[str, str]:
    """Return the columns that describe the machine in every CSV file."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else cpu_model(),
        "driver": query_smi().get("driver_version", "") if cuda else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "cuda": torch.version.cuda or torch.version.hip or "" if cuda else "",
        "cudnn": str(torch.backends.cudnn.version() or "") if cuda else "",
        "epsanet_fused": ef.__version__,
        "threads": str(torch.get_num_threads()),
    }


def triton_version() -> str:
    """Return Triton's version, or "" if it is not installed. Triton is not imported."""
    if importlib.util.find_spec("triton") is None:
        return ""
    return importlib.metadata.version("triton")


def query_smi() -> dict[str, str]:
    """Ask nvidia-smi about the first GPU. No setting is changed.

    A driver that does not know one field refuses the whole query. Then each field is queried by
    itself.

    Returns:
        Values by field; empty without nvidia-smi.
    """
    if shutil.which("nvidia-smi") is None:
        return {}
    if values := _run_smi(SMI_FIELDS):
        return values
    return {k: v for field in SMI_FIELDS for k, v in _run_smi((field,)).items()}


def _run_smi(fields: tuple[str, ...]) -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return {}
    return parse_smi(done.stdout, fields) if done.returncode == 0 else {}


def parse_smi(text: str, fields: tuple[str, ...]) -> dict[str, str]:
    """Parse the first line of ``nvidia-smi --format=csv,noheader``: {field: value with unit}."""
    lines = [line for line in text.splitlines() if line.strip()]
    values = [v.strip() for v in lines[0].split(",")] if lines else []
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def cache_bytes(device: torch.device) -> int:
    """Return the size of the device's last-level cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    kilobytes = [int(text[:-1]) for s in sizes if (text := s.read_text().strip()).endswith("K")]
    return max(kilobytes, default=32 * 1024) * 1024


def describe_gpu() -> dict[str, object]:
    """Return the contents of env.json: the GPU's properties, driver and versions."""
    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    return {
        **describe(device),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "nvidia_smi": query_smi(),
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(describe_gpu(), indent=2) + "\n")
