"""An AOTInductor package of the fused module runs in another process with the same numbers."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers.networks import exported, module, other_inputs

import epsanet_fused as ef

RUN_PACKAGE = """
import sys, warnings
import torch
warnings.simplefilter("ignore")
{first}
run = torch._inductor.aoti_load_package(sys.argv[1])
inputs, expected = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    for x, y in zip(inputs, expected):
        torch.testing.assert_close(run(x), y)
print("epsanet_fused" in sys.modules)
"""


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_aotinductor_package_runs_in_another_process(backend: str, tmp_path: Path) -> None:
    """A package with the operator needs epsanet_fused there; one by "reference" doesn't."""
    model, x = module()
    with ef.use_backend(backend):
        program = exported(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Inductor's own warnings
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
    inputs = other_inputs(x)
    with torch.no_grad():
        torch.save((inputs, [model(t) for t in inputs]), tmp_path / "cases.pt")
    first = "import epsanet_fused" if backend == "auto" else ""
    code = RUN_PACKAGE.format(first=first)
    command = [sys.executable, "-c", code, package, tmp_path / "cases.pt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(backend == "auto")]
