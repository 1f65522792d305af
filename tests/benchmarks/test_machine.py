"""Test the description of the machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import bench_psa
import pytest
import torch
from harness import machine

HAS_DRIVER = any(Path("/proc/driver/nvidia/gpus").glob("*"))
without_gpu = pytest.mark.skipif(
    torch.cuda.is_available() or HAS_DRIVER, reason="a test of machines without an NVIDIA GPU"
)


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch) -> Callable[[str], None]:
    """Return a function that puts an nvidia-smi with this shell code on PATH."""

    def make(code: str) -> None:
        fake = tmp_path / "nvidia-smi"
        fake.write_text(f"#!/bin/sh\n{code}\n")
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return make


def test_smi_is_asked_about_the_first_gpu_and_changes_no_setting(nvidia_smi, tmp_path):
    asked = tmp_path / "asked"
    nvidia_smi(f'echo "$@" >> {asked}; echo "580.65.06"; echo "another GPU"')
    assert machine.query_smi("driver_version") == "580.65.06"
    assert asked.read_text() == "--query-gpu=driver_version --format=csv,noheader\n"


@pytest.mark.parametrize("code", ["exit 9", 'echo "Field is not a valid field to query."; exit 2'])
def test_smi_without_an_answer_gives_nothing(code, nvidia_smi):
    nvidia_smi(code)
    assert machine.query_smi("driver_version") == ""


def test_every_column_of_the_machine_is_described():
    found = machine.describe(torch.device("cpu"))
    assert tuple(found) == machine.MACHINE
    assert found["torch"] == torch.__version__
    assert found["device"] and found["epsanet_fused"]
    assert found["threads"] == str(torch.get_num_threads())


def test_version_of_a_missing_package_is_empty():
    assert machine.version_of("no_such_package") == ""


def test_cpu_has_a_last_level_cache():
    assert machine.cache_bytes(torch.device("cpu")) >= 1 << 18


@without_gpu
def test_gpu_that_pytorch_does_not_see_is_reported(nvidia_smi, threads, capsys):
    nvidia_smi("echo Some GPU")
    for arguments, reported in (([], True), (["--device", "cpu"], False)):
        assert bench_psa.main(["--list-cases", "--input", "randn", *arguments]) == 0
        said = capsys.readouterr().err
        assert ("This machine has an NVIDIA GPU (Some GPU) that isn't timed" in said) == reported
        assert said.count("\n") == reported
    with pytest.raises(SystemExit):
        bench_psa.main(["--list-cases", "--device", "cuda"])
    assert "NVIDIA GPU (Some GPU)" in capsys.readouterr().err


@without_gpu
def test_nothing_is_said_without_a_gpu(threads, capsys):
    assert machine.unseen_gpu() is None
    assert bench_psa.main(["--list-cases", "--input", "randn"]) == 0
    assert not capsys.readouterr().err
