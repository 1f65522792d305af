"""Run the official network, exported to ONNX, by ONNX Runtime and OpenVINO on the CPU.

Both are optional: `make bench-rivals` installs them. Their threads are PyTorch's; their outputs are
tensors again.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.machine import version_of

Prepare = Callable[[nn.Module, Tensor], tuple[Callable[[], list[Tensor]], str]]
PACKAGES = ("onnx", "onnxscript")  # both rivals need these, too


def needs(package: str) -> Callable[[torch.device], str | None]:
    """Return the check whether this package can run an exported network on a device."""

    def unavailable_reason(device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"{package} is compared on CPUs only"
        missing = [p for p in (*PACKAGES, package) if importlib.util.find_spec(p) is None]
        return f"it needs {', '.join(missing)}; see make bench-rivals" if missing else None

    return unavailable_reason


@functools.lru_cache(maxsize=4)
def exported(model: nn.Module, shape: tuple[int, ...]) -> bytes:
    """Export a network in float32 for inputs of one shape, as an ONNX file."""
    plain = copy.deepcopy(model).float().to(memory_format=torch.contiguous_format).eval()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of packages that it misses
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)  # of the exporter's own code
        path = Path(folder, "model.onnx")
        torch.onnx.export(
            plain, (torch.randn(shape),), path, dynamo=True, external_data=False, verbose=False
        )
        return path.read_bytes()


def onnxruntime(model: nn.Module, x: Tensor) -> tuple[Callable[[], list[Tensor]], str]:
    """Return the step by ONNX Runtime, with all of its graph optimizations; float32 only."""
    import onnxruntime as ort

    if x.dtype != torch.float32:
        raise ValueError(f"onnxruntime runs this network in float32 on CPUs, not in {x.dtype}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = ort.InferenceSession(
        exported(model, tuple(x.shape)), options, providers=["CPUExecutionProvider"]
    )
    feed = {session.get_inputs()[0].name: x.contiguous().numpy()}
    return (
        lambda: [torch.from_numpy(session.run(None, feed)[0])],
        f"onnxruntime {version_of('onnxruntime')}",
    )


def openvino(model: nn.Module, x: Tensor) -> tuple[Callable[[], list[Tensor]], str]:
    """Return the step by OpenVINO; in 16 bits it gets float32 tensors and computes in bfloat16."""
    import openvino as ov

    if x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"openvino runs in float32 and bfloat16 on CPUs, not in {x.dtype}")
    core = ov.Core()
    precision = "f32" if x.dtype == torch.float32 else "bf16"
    compiled = core.compile_model(
        core.read_model(exported(model, tuple(x.shape))),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    request = compiled.create_infer_request()
    request.set_input_tensor(ov.Tensor(x.float().contiguous().numpy()))  # a copy

    def step() -> list[Tensor]:
        request.infer()
        return [torch.from_numpy(request.get_output_tensor().data).to(x.dtype)]

    return step, f"openvino {version_of('openvino')} {precision}"
