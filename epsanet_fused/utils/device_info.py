"""What a measurement was taken on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def cpu_model() -> str:
    """The processor's name as its maker gives it, or at least the architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The device's name, with the number of threads for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{cpu_model()}, {torch.get_num_threads()} thread(s)"
    return str(device.type)


def library_versions(device: torch.device) -> str:
    """The versions of PyTorch and of the library that runs its convolutions there, and how."""
    if device.type == "cuda":
        how = " autotuned" if torch.backends.cudnn.benchmark else ""
        return f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}{how}"
    return f"torch {torch.__version__}"  # which has its oneDNN inside


def conv_eps(dtype: torch.dtype, device: torch.device) -> float:
    """The relative rounding of what a convolution there multiplies.

    cuDNN may take TF32 for float32, whose significand is float16's; by default PyTorch lets it.
    """
    tf32 = device.type == "cuda" and torch.backends.cudnn.conv.fp32_precision == "tf32"
    return torch.finfo(torch.float16 if tf32 and dtype == torch.float32 else dtype).eps
