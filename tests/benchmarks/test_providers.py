"""Test the table of providers."""

from __future__ import annotations

import providers
import torch

import epsanet_fused as ef


def test_compile_without_a_compiler_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    reason = providers.PROVIDERS["compile"].unavailable_reason(torch.device("cpu"))
    assert reason == "torch.compile needs a C++ compiler, and there is no no-such-compiler"


def test_every_backend_of_the_package_is_a_provider():
    assert set(ef.list_backends()) - {"reference"} <= set(providers.PROVIDERS)
