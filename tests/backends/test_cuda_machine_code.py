"""The library has every CUDA kernel for every architecture, compiled as intended.

The tests inspect the machine code. They need no GPU, but a library that was built with nvcc.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from epsanet_fused.backends.compiled import LIBRARY_FILE, load_library

ARCHS = ["sm_80", "sm_90", "sm_100", "sm_120"]
CLUSTERS = ["sm_90", "sm_100", "sm_120"]  # architectures that have clusters and bulk copies
# The kernels, with the number of their bool template arguments.
FLAGS = {
    "sum_rows": 1,
    "sum_columns": 2,
    "recalibrate_runs": 1,
    "recalibrate_columns": 2,
    "one_pass": 2,
    "se_alone": 1,
    "fc_grad": 0,
}
STREAMING = ["sum_rows", "sum_columns", "recalibrate_runs", "recalibrate_columns", "one_pass"]
THREADS = defaultdict(lambda: 256, fc_grad=1024)  # of a block
IN_FLIGHT = 4  # loads that a thread issues before it uses the first


class Kernel(NamedTuple):
    """One kernel's machine code for one architecture."""

    name: str
    arch: str
    dtype: str  # "Half", "Bfloat", "float", or "" if the kernel isn't a template of it
    flags: tuple[bool, ...]
    registers: int
    stack: int  # bytes
    shared: int  # bytes, static
    instructions: list[str]  # opcodes in order: "LDG.E.128"

    def wide(self, opcode: str) -> list[int]:
        """Return the positions of the opcode's 128-bit accesses."""
        pattern = re.compile(rf"{opcode}\.E(\.\w+)*\.128\b")
        return [i for i, name in enumerate(self.instructions) if pattern.match(name)]


def max_registers(kernel: Kernel) -> int:
    """Return how many registers a thread may use.

    Several blocks must fit a multiprocessor: four of one_pass, three with four loads in flight, two
    with eight.
    """
    if kernel.name == "fc_grad":
        return 64
    if kernel.name.startswith("sum") and kernel.flags[-1]:
        return 128
    return 64 if kernel.name == "one_pass" else 80


def cuobjdump() -> str | None:
    """Find CUDA's own, or Triton's copy of it."""
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton
    except ImportError:
        return None
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(tool) if tool.is_file() else None


def kernels_of(file: Path, arch: str) -> Iterator[Kernel]:
    """Yield all kernels of a library for one architecture."""
    command = [cuobjdump(), "-arch", arch, file]
    usage, sass = (
        subprocess.run([*command, flag], capture_output=True, text=True, check=True).stdout
        for flag in ("-res-usage", "-sass")
    )
    resources = {}
    for line in usage.splitlines():
        if m := re.match(r"\s*Function (\S+):", line):
            name = m[1]
        elif m := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            resources[name] = tuple(map(int, m.groups()))
    instruction = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]+)", re.M)
    for body in sass.split("Function : ")[1:]:
        mangled = body.split()[0]
        yield Kernel(*names_of(mangled, arch), *resources[mangled], instruction.findall(body))


def names_of(mangled: str, arch: str) -> tuple[str, str, str, tuple[bool, ...]]:
    """Return (name, arch, dtype, flags): sum_rows<Half, true> is 8sum_rowsINS0_4HalfELb1EEEv."""
    name = next(n for n in FLAGS if f"{len(n)}{n}" in mangled)
    arguments = mangled.rpartition(f"{len(name)}{name}")[2]
    arguments = arguments[: arguments.find("EEv") + 1] if arguments.startswith("I") else ""
    dtype = m[1] if (m := re.search(r"\d(Half|Bfloat)E", arguments)) else ""
    dtype = "float" if arguments.startswith("If") else dtype
    return name, arch, dtype, tuple(f == "1" for f in re.findall(r"Lb([01])E", arguments))


# Disassembling an architecture takes some seconds. The groups are for xdist's workers.
ARCH_PARAMS = [
    pytest.param(
        arch, marks=[pytest.mark.xdist_group(arch), *[pytest.mark.slow] * (arch != "sm_90")]
    )
    for arch in ARCHS
]


@pytest.fixture(scope="module", params=ARCH_PARAMS)
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def kernels(arch: str) -> list[Kernel]:
    """Return the kernels of one architecture."""
    found = load_library()
    assert found.unavailable_reason is None and found.cpu_capability
    if not found.cuda_archs:
        pytest.skip(f"the library was built without CUDA: {found.build_note}")
    if cuobjdump() is None:
        pytest.skip("needs cuobjdump: CUDA's own, or Triton's copy of it")
    assert found.cuda_archs.split() == [*ARCHS, "compute_120"]
    return list(kernels_of(LIBRARY_FILE, arch))


def select(kernels: list[Kernel], *names: str) -> list[Kernel]:
    """Return the kernels of these names."""
    found = [k for k in kernels if k.name in names]
    assert {k.name for k in found} == set(names)
    return found


def test_all_kernels_are_there(kernels: list[Kernel]) -> None:
    dtypes = {"Half", "Bfloat", "float"}
    for name, flags in FLAGS.items():
        found = [(k.dtype, k.flags) for k in kernels if k.name == name]
        assert len(found) == len(set(found)) == (3 if name in STREAMING else 1) * 2**flags
        assert {d for d, _ in found} == (dtypes if name in STREAMING else {""})


def test_nothing_spills(kernels: list[Kernel]) -> None:
    for k in kernels:
        assert k.stack == 0, k[:4]
        assert not [i for i in k.instructions if i.split(".")[0] in ("LDL", "STL")], k[:4]


def test_registers_suffice_for_the_blocks(kernels: list[Kernel]) -> None:
    for k in kernels:
        assert k.registers <= max_registers(k), k[:5]
        assert k.registers * THREADS[k.name] <= 65536, k[:5]


def test_no_shared_memory_but_the_dynamic(kernels: list[Kernel]) -> None:
    """From sm_90 on, CUDA itself reserves 1 KB of each block's shared memory."""
    for k in kernels:
        assert k.shared <= 1024, k[:4]


def test_sums_have_four_wide_loads_in_flight(kernels: list[Kernel]) -> None:
    """Each thread issues all loads before the first shuffle or store.

    There are four loads of branches and, with products, four of the gradient.
    """
    for k in select(kernels, "sum_rows", "sum_columns"):
        product = k.flags[-1]
        if k.name == "sum_columns" and not k.flags[0]:
            continue  # single elements, of any strides
        needed = IN_FLIGHT * (1 + product)
        assert len(k.wide("LDG")) >= needed, k[:4]
        first = next(i for i, name in enumerate(k.instructions) if re.match("SHFL|STG|STS", name))
        assert len([i for i in k.wide("LDG") if i < first]) >= needed, k[:4]


def test_recalibration_is_wide_on_both_sides(kernels: list[Kernel]) -> None:
    for k in select(kernels, "recalibrate_runs", "recalibrate_columns"):
        if k.name == "recalibrate_columns" and not k.flags[0]:
            continue  # single elements, of any strides
        loads, stores = k.wide("LDG"), k.wide("STG")
        assert len(stores) >= IN_FLIGHT, k[:4]
        assert len([i for i in loads if i < stores[0]]) >= IN_FLIGHT, k[:4]


def test_last_reads_of_branches_are_evict_first(kernels: list[Kernel]) -> None:
    """Then the caches keep data that is still needed."""
    last = select(kernels, "recalibrate_runs", "recalibrate_columns")
    last += [k for k in select(kernels, "sum_rows", "sum_columns") if k.flags[-1]]
    for k in last:
        if k.name.endswith("columns") and not k.flags[0]:
            continue  # single elements, of any strides
        assert [i for i in k.instructions if i.startswith("LDG.E.EF")], k[:4]


def test_one_pass_copies_in_bulk_where_there_are_clusters(kernels: list[Kernel]) -> None:
    for k in select(kernels, "one_pass"):
        if k.arch not in CLUSTERS:
            assert not k.wide("STG"), k[:4]  # an empty kernel
            continue
        assert [i for i in k.instructions if i.startswith("UBLKCP")], k[:4]
        assert k.wide("STG"), k[:4]
        assert not k.wide("LDG"), k[:4]
        assert [i for i in k.instructions if re.match(r"LDS(\.\w+)*\.128", i)], k[:4]
