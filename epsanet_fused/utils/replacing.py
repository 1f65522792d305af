"""Put a module of another class in the place of one, with its state, and call the first one's code.

A replacement computes the same in another way, as long as nobody relies on calls of the modules in
it (see ``hooks.py``). Where somebody does, the code that it replaced runs: on the same attributes,
so on the same parameters, buffers and children.
"""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def replace_class(module: nn.Module, cls: type[Module]) -> Module:
    """Return a ``cls`` with the state of ``module``, see ``take_state``."""
    made = cls.__new__(cls)
    take_state(made, module, cls)
    return made


def take_state(made: nn.Module, module: nn.Module, cls: type[nn.Module]) -> None:
    """Give ``made`` the state of ``module``: submodules, parameters, hooks, attributes.

    Attributes that other code has set on the module are kept too: YOLO's parser stores the index
    of each layer's input on the layer.

    Args:
        made: a new module; nothing has been set on it.
        module: the module that it replaces, which stays as it is.
        cls: the class by which ``original_of`` finds the class of ``module`` again.
    """
    made.__dict__.update(vars(module))
    for name in ("_parameters", "_buffers", "_modules"):
        made.__dict__[name] = copy.copy(vars(module)[name])
    made.__dict__["_originals"] = {**vars(module).get("_originals", {}), cls: type(module)}


def is_replacement(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Return whether ``module`` replaced one of another class as a ``cls``."""
    return cls in module.__dict__.get("_originals", ())


def original_class(module: nn.Module, cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class of the module that this one replaced as a ``cls``."""
    kind: type[nn.Module] = module.__dict__["_originals"][cls]
    return kind


def original_of(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """Return a module of the class that ``cls`` replaced here, on the attributes of ``module``."""
    kind = original_class(module, cls)
    original: nn.Module = kind.__new__(kind)
    original.__dict__ = module.__dict__
    return original


def call_original(module: nn.Module, cls: type[nn.Module], x: Tensor) -> Tensor:
    """Return what the code that ``cls`` replaced here computes of ``x``."""
    original = original_of(module, cls)
    # Not original.forward: somebody may have set an attribute of this name, which calls this.
    out: Tensor = type(original).forward(original, x)
    return out
