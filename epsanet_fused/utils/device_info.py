"""Describe the hardware and the libraries that a measurement was taken on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def cpu_model() -> str:
    """Return the processor's model name, or at least its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """Return the device's name, with the number of threads for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{cpu_model()}, {torch.get_num_threads()} thread(s)"
    return str(device.type)


def library_versions(device: torch.device) -> str:
    """Return the versions of PyTorch and of the library that runs its convolutions there."""
    if device.type == "cuda":
        tuned = " autotuned" if torch.backends.cudnn.benchmark else ""
        return f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}{tuned}"
    return f"torch {torch.__version__}"  # its oneDNN is part of it


def conv_eps(dtype: torch.dtype, device: torch.device) -> float:
    """Return the machine epsilon of the factors that a convolution on this device multiplies.

    cuDNN may round float32 to TF32, which has float16's significand; PyTorch allows it by default.
    """
    precision: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    tf32 = device.type == "cuda" and precision == "tf32"
    return torch.finfo(torch.float16 if tf32 and dtype == torch.float32 else dtype).eps
