"""Build the compiled library; all metadata is in pyproject.toml.

The environment variable EPSANET_FUSED_BUILD selects what to build:

- ``auto`` (default): as much as this machine can build, at least a pure-Python package;
- ``0``: a pure-Python package;
- ``cpu``: the CPU kernels, or fail;
- ``cuda``: the CPU and the CUDA kernels, or fail.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import setup

MODE = os.environ.get("EPSANET_FUSED_BUILD", "auto")
MODES = ("auto", "0", "cpu", "cuda")
SOURCES = (".cpp", ".cu")
ARCHS = (80, 90, 100, 120)
# The oldest torch whose stable ABI has all that the bindings use; the library works with it and all
# later ones.
TORCH_TARGET = "0x020a000000000000"
HOST_FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=fast"]
NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC"]
NVCC_FLAGS += ["-Xfatbin=-compress-all"]


class Toolkit(NamedTuple):
    """A CUDA toolkit: its folder, the static runtime's folder, and the ARCHS that nvcc supports."""

    home: Path
    libraries: Path
    archs: tuple[int, ...]


class UnavailableError(Exception):
    """This machine can't build something; the message is the reason."""


def log(text: str) -> None:
    print(f"epsanet_fused: {text}", file=sys.stderr, flush=True)


def import_torch() -> None:
    # pip builds in an isolated environment. If torch were a build requirement, pip would download
    # it again; so use the installed one. The library works with other versions of torch too.
    sys.path.append(sysconfig.get_path("platlib"))
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise UnavailableError(
            f"torch can't be imported by {sys.executable} ({error}); install torch first, and "
            f"build with pip"
        ) from None


def check_host() -> None:
    if platform.system() != "Linux":
        raise UnavailableError(
            f"the compiled library is for Linux, and this is {platform.system()}"
        )
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        raise UnavailableError(f"there is no C++ compiler: {compiler} isn't on PATH")


def find_toolkit() -> Toolkit:
    import torch

    if torch.version.hip:
        raise UnavailableError("this torch is for ROCm")
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    candidates = [Path(named)] if named else []
    if not named:
        if on_path:  # may be a link, or a wrapper script outside of the toolkit
            candidates.append(Path(on_path).resolve().parent.parent)
        candidates.append(Path("/usr/local/cuda"))
    for home in candidates:
        for folder in ("lib64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "lib"):
            static = home / folder / "libcudart_static.a"
            if (home / "bin/nvcc").exists() and static.exists():
                return Toolkit(home.resolve(), static.parent, supported_archs(home / "bin/nvcc"))
    searched = ", ".join(str(home) for home in candidates)
    raise UnavailableError(
        f"no CUDA toolkit (bin/nvcc and libcudart_static.a) in {searched}; CUDA_HOME names another"
    )


def supported_archs(nvcc: Path) -> tuple[int, ...]:
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False)
    archs = tuple(arch for arch in ARCHS if f"compute_{arch}" in listed.stdout.split())
    if 90 not in archs:
        raise UnavailableError(f"{nvcc} doesn't know compute_90; CUDA 12 or later is needed")
    return archs


class Plan(NamedTuple):
    """The build: a library or none, with CUDA if there is a toolkit; ``note`` says why without."""

    has_library: bool
    toolkit: Toolkit | None = None
    note: str = ""


def make_plan() -> Plan:
    """Decide what to build, and log it in one line."""
    if MODE not in MODES:
        sys.exit(f"EPSANET_FUSED_BUILD must be one of {', '.join(MODES)}, got {MODE!r}")
    if MODE == "0":
        log("building a pure-Python package, as EPSANET_FUSED_BUILD=0 says")
        return Plan(False)
    try:
        check_host()
        import_torch()
    except UnavailableError as reason:
        if MODE != "auto":
            sys.exit(f"epsanet_fused: EPSANET_FUSED_BUILD={MODE}, but {reason}")
        log(f"building a PURE-PYTHON package, without compiled kernels: {reason}")
        return Plan(False)
    if MODE == "cpu":
        return without_cuda("EPSANET_FUSED_BUILD was cpu")
    try:
        toolkit = find_toolkit()
    except UnavailableError as reason:
        if MODE == "cuda":
            sys.exit(f"epsanet_fused: EPSANET_FUSED_BUILD=cuda, but {reason}")
        return without_cuda(str(reason))
    missing = [f"sm_{arch}" for arch in ARCHS if arch not in toolkit.archs]
    archs = arch_names(toolkit)
    if missing:
        archs += f", not {', '.join(missing)}, which it doesn't know"
    log(f"building the CPU and CUDA kernels, with {toolkit.home} for {archs}")
    return Plan(True, toolkit)


def without_cuda(reason: str) -> Plan:
    log(f"building the CPU kernels, without CUDA: {reason}")
    return Plan(True, None, reason)


def arch_names(toolkit: Toolkit) -> str:
    return f"{' '.join(f'sm_{arch}' for arch in toolkit.archs)} compute_{toolkit.archs[-1]}"


def extension(toolkit: Toolkit | None, note: str):
    from torch.utils.cpp_extension import CppExtension

    sources = sorted(str(p) for f in ("csrc", "csrc/cpu") for p in Path(f).glob("*.cpp"))
    host = [*HOST_FLAGS, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    host.append(f'-DPSA_BUILD_NOTE="{note}"')
    link = ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
    nvcc: list[str] = []
    folders: list[str] = []
    if toolkit is not None:
        sources += [str(p) for p in sorted(Path("csrc/cuda").iterdir()) if p.suffix in SOURCES]
        host += ["-DUSE_CUDA", f'-DPSA_WITH_CUDA="{arch_names(toolkit)}"']
        newest = toolkit.archs[-1]
        nvcc = [*NVCC_FLAGS, f"-gencode=arch=compute_{newest},code=compute_{newest}"]
        nvcc += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in toolkit.archs]
        link += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        folders = [str(toolkit.libraries)]
    return CppExtension(
        "epsanet_fused._C",
        sources,
        depends=[str(p) for p in Path("csrc").rglob("*.*h")],
        include_dirs=[str(toolkit.home / "include")] if toolkit else [],
        library_dirs=folders,
        extra_compile_args={"cxx": host, "nvcc": nvcc},
        extra_link_args=link,
        py_limited_api=True,
    )


def build_command(toolkit: Toolkit | None):
    """Return BuildExtension with the toolkit set; a CPU-only torch doesn't look for one."""
    from torch.utils import cpp_extension

    if toolkit is not None:
        cpp_extension.CUDA_HOME = str(toolkit.home)
        # It compares the toolkit's version with torch's. The kernels link a runtime of their own.
        cpp_extension._check_cuda_version = lambda *args: None

    class Build(cpp_extension.BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if MODE != "auto":
                    raise
                log(f"building a PURE-PYTHON package, as the compiled library FAILED: {error}")
                self.extensions = []

        def copy_extensions_to_source(self) -> None:
            if self.extensions:
                super().copy_extensions_to_source()

    return Build


plan = make_plan() if "egg_info" not in sys.argv else Plan(False)
if plan.has_library:
    setup(
        ext_modules=[extension(plan.toolkit, plan.note)],
        cmdclass={"build_ext": build_command(plan.toolkit)},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
else:
    setup()
