"""The compiled library, shared by the rooms ``cpu`` and ``cuda``: found and loaded when needed.

The library registers kernels for ``psa_tail_native`` and its backward; what those lack is autograd,
which only ``psa_tail`` has.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import NamedTuple

import epsanet_fused

PATH = Path(epsanet_fused.__file__).with_name("_C.abi3.so")
_HOW = "see 'Install' in the README"


class Library(NamedTuple):
    """What the library holds, or why there is none."""

    problem: str | None
    cpu_capability: str | None  # the instruction set in use, e.g. "avx512"
    cuda_archs: str  # "" if it was built without CUDA


@functools.cache
def library() -> Library:
    """Load the library, once. Without one, or with one that fails to load, the package works."""
    if not PATH.exists():
        return Library(f"the package was installed without its compiled library; {_HOW}", None, "")
    try:
        loaded = ctypes.CDLL(str(PATH))  # registers its kernels with torch
    except OSError as error:
        return Library(f"the compiled library doesn't load: {error}", None, "")
    return Library(
        None,
        _text(loaded.epsanet_fused_cpu_capability),
        _text(loaded.epsanet_fused_cuda_archs) or "",
    )


def _text(function: ctypes._NamedFuncPointer) -> str | None:
    function.restype = ctypes.c_char_p
    text = function()
    return None if text is None else text.decode()
