"""``python -m epsanet_fused``: print versions, devices and backends, and check each backend.

The exit status is 0 if every backend that can run here gives the right numbers.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

import epsanet_fused as ef
from epsanet_fused.testing.self_check import self_check


def main() -> int:
    """Print the report and return the exit status."""
    print(f"epsanet_fused {ef.__version__}, Python {platform.python_version()}")
    print(f"torch         {torch.__version__}, CUDA {torch.version.cuda}, HIP {torch.version.hip}")
    print(f"triton        {_version('triton')}")
    devices = _devices()
    print("\ndevices")
    for device, name in devices.items():
        print(f"  {device:10s} {name}")
    print("\nbackends")
    for name, status in ef.list_backends().items():
        print(f"  {name:10s} {'can run' if status.available else 'cannot run: ' + status.reason}")
    print("\nself-check, forward and backward against the reference in float64")
    checks = self_check(list(devices))
    for check in checks:
        result = "ok" if check.passed else "FAILED"
        print(f"  {check.backend:10s} on {check.device:8s} {result}: {check.message}")
    return 0 if all(check.passed for check in checks) else 1


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, str]:
    devices = {
        "cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    }
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        devices[f"cuda:{i}"] = f"{p.name}, {p.total_memory / 2**30:.0f} GiB"
    return devices


if __name__ == "__main__":
    sys.exit(main())
