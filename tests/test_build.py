"""setup.py builds what it is asked for; a package without a working library runs all the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
USE = (
    "import torch, warnings, epsanet_fused as ef\n"
    "with warnings.catch_warnings(record=True) as seen:\n"
    "    warnings.simplefilter('always')\n"
    "    ef.FusedPSAModule(64, 64)(torch.randn(1, 64, 8, 8)).sum().backward()\n"
    "    ef.psa_tail([torch.randn(1, 4, 2, 2)] * 2, torch.ones(1, 4), torch.ones(1),\n"
    "                torch.ones(4, 1), torch.ones(4))\n"
    "print(ef.__file__)\n"
    "print(ef.list_backends()['cpu'])\n"
    "print(len(seen), seen[0].message)\n"
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return the folder of a copy of the source distribution's files."""
    copy = tmp_path / "source"
    skip = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "epsanet_fused"):
        shutil.copytree(ROOT / name, copy / name, ignore=skip)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    return copy


def setup(
    source: Path, *command: str, before: str = "", **env: str
) -> subprocess.CompletedProcess[str]:
    """Run setup.py in a process of its own, after the Python code ``before``."""
    code = f"{before}\nimport runpy; runpy.run_path('setup.py', run_name='__main__')"
    return run_python("-c", code, *command, cwd=source, **env)


def run_python(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
    )


def bdist(source: Path, **kwargs: str) -> tuple[str, Path]:
    """Build a wheel. Return the last line that setup.py logs, and the wheel."""
    done = setup(source, "-q", "bdist_wheel", **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    logged = [line for line in done.stderr.splitlines() if line.startswith("epsanet_fused: ")]
    return logged[-1].removeprefix("epsanet_fused: "), wheel


def use(wheel: Path) -> tuple[str, str]:
    """Run USE with the wheel's package. Return the status of backend "cpu", and the warning."""
    return use_folder(extract(wheel))


def extract(wheel: Path) -> Path:
    site = wheel.parent / "site"
    zipfile.ZipFile(wheel).extractall(site)
    return site


def use_folder(site: Path) -> tuple[str, str]:
    done = run_python("-c", USE, cwd=site, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    file, status, warning = done.stdout.splitlines()
    assert file.startswith(str(site))
    return status, warning


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"EPSANET_FUSED_BUILD": "all"}, "must be one of auto, 0, cpu, cuda, got 'all'"),
        (
            {"EPSANET_FUSED_BUILD": "cuda", "CUDA_HOME": "/nowhere"},
            "no CUDA toolkit (bin/nvcc and libcudart_static.a) in /nowhere",
        ),
        ({"EPSANET_FUSED_BUILD": "cpu", "CXX": "no-such-compiler"}, "no-such-compiler isn't on"),
        ({"EPSANET_FUSED_BUILD": "cpu", "CXX": "false"}, "returned non-zero exit status"),
    ],
    ids=["unknown mode", "no toolkit", "no compiler", "a failing compiler"],
)
def test_a_mode_that_is_asked_for_fails_hard(
    source: Path, env: dict[str, str], message: str
) -> None:
    done = setup(source, "-q", "bdist_wheel", **env)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert not (source / "dist").exists()


def test_without_torch_fails_hard_too(source: Path) -> None:
    hide = "import sys; sys.modules['torch'] = None"
    done = setup(source, "-q", "bdist_wheel", before=hide, EPSANET_FUSED_BUILD="cpu")
    assert done.returncode != 0
    assert "EPSANET_FUSED_BUILD=cpu, but torch can't be imported by" in done.stderr


def test_mode_0_makes_a_pure_python_package_that_works(source: Path) -> None:
    logged, wheel = bdist(source, EPSANET_FUSED_BUILD="0")
    assert logged == "building a pure-Python package, as EPSANET_FUSED_BUILD=0 says"
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(wheel).namelist())
    status, warning = use(wheel)
    assert "this is a pure-Python package" in status
    assert warning.startswith("1 epsanet_fused: the backend 'cpu' can't run on cpu tensors")
    assert "slower" in warning


@pytest.mark.parametrize(
    ("before", "env", "reason"),
    [
        ("import sys; sys.modules['torch'] = None", {}, "torch can't be imported"),
        ("", {"CXX": "no-such-compiler"}, "no-such-compiler isn't on PATH"),
        ("", {"CXX": "false", "CUDA_HOME": "/nowhere"}, "the compiled library FAILED"),
    ],
    ids=["no torch", "no compiler", "a failing compiler"],
)
def test_auto_logs_why_there_is_no_library(
    source: Path, before: str, env: dict[str, str], reason: str
) -> None:
    logged, wheel = bdist(source, before=before, EPSANET_FUSED_BUILD="auto", **env)
    assert logged.startswith("building a PURE-PYTHON package")
    assert reason in logged
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(wheel).namelist())
    assert "this is a pure-Python package" in use(wheel)[0]


@pytest.mark.slow
def test_auto_without_a_toolkit_builds_the_cpu_kernels_and_records_why(source: Path) -> None:
    logged, wheel = bdist(source, EPSANET_FUSED_BUILD="auto", CUDA_HOME="/no where (yet)")
    assert logged.startswith("building the CPU kernels, without CUDA: no CUDA toolkit")
    assert "-abi3-" in wheel.name
    site = extract(wheel)
    code = "import epsanet_fused as ef; print(*ef.list_backends().values(), sep='\\n')"
    done = run_python("-c", code, cwd=site, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    _, cpu, _, cuda = done.stdout.splitlines()
    assert cpu == "BackendStatus(available=True, reason='')"
    assert "built without CUDA: no CUDA toolkit" in cuda
    assert "in /no where (yet); CUDA_HOME names another" in cuda


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"not a library", id="no library", marks=pytest.mark.slow),
    ],
)
def test_a_library_that_does_not_load_leaves_a_working_package(
    tmp_path: Path, content: bytes
) -> None:
    shutil.copytree(ROOT / "epsanet_fused", tmp_path / "epsanet_fused")
    (tmp_path / "epsanet_fused/_C.abi3.so").write_bytes(content)
    status, warning = use_folder(tmp_path)
    assert "the compiled library doesn't load: " in status
    assert "file too short" in status or "invalid ELF header" in status  # the loader's messages
    assert "slower" in warning
    report = run_python("-m", "epsanet_fused", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert report.returncode == 0
    assert "cannot run: the compiled library doesn't load" in report.stdout
