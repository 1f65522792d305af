"""Name the layers of a PSA module, official or not."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn


class UnfusableError(Exception):
    """A module looks like a PSA module but cannot be replaced; the message gives the reason."""


class PSALayers(NamedTuple):
    """The names of the submodules of a PSA module.

    Attributes:
        branches: the submodules that compute one branch each, in the order of the module.
        ses: the names of the two layers of each SE: one pair for all branches, or one per branch.
    """

    branches: tuple[str, ...]
    ses: tuple[tuple[str, str], ...]


def parameter_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the layers in ``module`` that have parameters, by name.

    A parametrized layer holds its parameters in a submodule called ``parametrizations``, so it is
    recognised by its class. Its weight is not read: reading can change it, as in spectral_norm.
    """
    return {
        name: m
        for name, m in module.named_modules()
        if (m._parameters or isinstance(m, (nn.Conv2d, nn.Linear)))
        and "parametrizations" not in name.split(".")
    }


def convs_of(module: nn.Module) -> list[nn.Conv2d]:
    """Return the convolutions in ``module``, in the order in which they are registered."""
    return [m for m in parameter_layers(module).values() if isinstance(m, nn.Conv2d)]


def branch_convs(module: nn.Module, layers: PSALayers) -> list[list[nn.Conv2d]]:
    """Return the convolutions of each branch."""
    return [convs_of(module.get_submodule(name)) for name in layers.branches]


def bypassed_modules(module: nn.Module, layers: PSALayers) -> dict[str, nn.Module]:
    """Return the modules that a fused module does not call: all but the branches.

    The key of ``module`` itself is "".
    """
    called = {m for name in layers.branches for m in module.get_submodule(name).modules()}
    return {name: part for name, part in module.named_modules() if part not in called}
