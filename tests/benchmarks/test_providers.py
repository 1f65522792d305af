"""Test the table of providers."""

from __future__ import annotations

import pytest
import torch
from harness.cases import MODES, SCOPES
from harness.providers import FOR_BASELINES, PROVIDERS, defaults

import epsanet_fused as ef

CPU = torch.device("cpu")


def test_compile_without_a_compiler_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    reason = PROVIDERS["compile"].unavailable_reason(CPU)
    assert reason == "torch.compile needs a C++ compiler, and there is no no-such-compiler"


def test_every_backend_of_the_package_is_a_provider():
    assert set(ef.list_backends()) - {"reference"} <= set(PROVIDERS)


def test_interpreted_kernels_are_not_timed(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET=1" in PROVIDERS["triton"].unavailable_reason(CPU)


def test_every_provider_says_what_it_is_in_one_line():
    for provider in PROVIDERS.values():
        assert provider.about and "\n" not in provider.about
        assert set(provider.scopes) <= set(SCOPES) and set(provider.modes) <= set(MODES)


def test_providers_of_baselines_are_those_of_epsanet_for_networks():
    assert set(FOR_BASELINES) <= set(PROVIDERS)
    of_resnet = {name for name in PROVIDERS if name.startswith("resnet50:")}
    assert of_resnet == {f"resnet50:{name}" for name in FOR_BASELINES}
    for name in of_resnet:
        assert PROVIDERS[name].scopes == ("network",)


@pytest.mark.parametrize("scope", SCOPES)
def test_defaults_can_run_here_or_say_why_not(scope):
    mode = "training" if scope == "norm" else "inference"
    names = defaults(CPU, scope, [mode])
    assert names[0] == "eager", "the speed-ups are against the first"
    assert {"cleaned", "fused"} <= set(names)
    assert all(PROVIDERS[name].fits(scope, mode) for name in names)
    unavailable = {name for name in names if PROVIDERS[name].unavailable_reason(CPU)}
    assert unavailable <= {"compile", *ef.list_backends()}
