"""Watch a module run on noise, to tell branches and a gate over them from other convolutions."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from epsanet_fused.fusion.detect import is_plain_container, iter_children
from epsanet_fused.nn.effects import unchanged_random_states
from epsanet_fused.nn.equivalence import copy_in_float64
from epsanet_fused.nn.psa_layers import UnfusableError, parameter_layers

_SOFTMAXES = {"softmax", "special_softmax"}
_SIGMOIDS = {"sigmoid", "sigmoid_", "special_expit", "expit", "hardsigmoid", "hardsigmoid_"}
_B = 2
_SMALLEST_SIDE = 8
# Attention with a table of positions takes one size only.
_USUAL_SIDES = (7, 14, 16, 28, 32)


class _Alike(NamedTuple):
    """A number of children whose first convolutions take ``in_channels`` each."""

    number: int
    in_channels: int


def has_gated_branches(module: nn.Module, *, try_sizes: bool = False) -> bool | None:
    """Return whether ``module`` has several branches, and a softmax or SE over them.

    A float64 copy runs on noise. Branches are children with a convolution that are called with one
    tensor, or with slices of one, and give outputs of one shape. A gate is a softmax over as many
    values as there are branches, or sigmoids of one value per channel of each branch. What happens
    within a branch is no gate.

    Args:
        module: it is not run or changed.
        try_sizes: if it can't be run on a small input, try usual sizes, which takes longer.

    Returns:
        None if that can't be seen: the module can't be run on noise, or calls none of its children.
    """
    if is_plain_container(module):
        return False
    if not (alike := _alike_children(module)):
        return False
    if any(is_lazy(p) or p.is_meta for p in module.parameters()):
        return None
    devices = {p.get_device() for p in module.parameters() if p.is_cuda}
    with (
        unchanged_random_states(devices),
        torch.inference_mode(False),
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            copied = copy_in_float64(module)
        except UnfusableError:
            return None
        sides = _USUAL_SIDES if try_sizes else ()
        return _watch(copied, list(_input_shapes(module, alike, sides)))


def _convs_of_children(module: nn.Module) -> dict[str, list[_ConvNd]]:
    """Return the convolutions of each child of ``module`` that holds some."""
    found = {}
    for name, child in iter_children(module):
        convs = [m for m in parameter_layers(child).values() if isinstance(m, _ConvNd)]
        if convs:
            found[name] = convs
    return found


def _alike_children(module: nn.Module) -> list[_Alike]:
    """Return the numbers of children that have the same outer widths, and these input widths."""
    counts = Counter(
        (convs[0].in_channels, convs[-1].out_channels)
        for convs in _convs_of_children(module).values()
    )
    return [_Alike(number, C) for (C, _), number in counts.items() if number > 1]


def _input_shapes(
    module: nn.Module, alike: Sequence[_Alike], sides: Sequence[int]
) -> Iterator[tuple[int, ...]]:
    """Yield the shapes of input that ``module`` may take: small ones, and those with ``sides``."""
    convs = [m for m in module.modules() if isinstance(m, _ConvNd)]
    side, lost = _SMALLEST_SIDE, 0
    for conv in convs:
        extents = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        side = max(side, *(extent + 1 for extent in extents))
        if not isinstance(conv.padding, str):
            lost += max(0, *(e - 2 * p for e, p in zip(extents, conv.padding, strict=True)))
    widths = [convs[0].in_channels]
    for number, C in alike:
        widths += [C, number * C]
    for H, C in itertools.product((side + lost, *sides), dict.fromkeys(widths)):
        yield (_B, C, *[H] * len(convs[0].kernel_size))


def _watch(module: nn.Module, shapes: Sequence[tuple[int, ...]]) -> bool | None:
    """Run ``module`` on noise of the first shape that it takes."""
    parameter = next(module.parameters())
    for shape in shapes:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        with _Watcher(module) as watcher, torch.autocast(parameter.device.type, enabled=False):
            try:
                module.eval()
                module(x.to(parameter.device))
            except Exception:  # a module can raise any exception
                continue
            finally:
                watcher.remove_hooks()
        return watcher.has_gates() if watcher.calls else None
    return None


class _Call(NamedTuple):
    """A call of a child: its input's storage and version, and its output's shape."""

    child: nn.Module
    source: tuple[int, int]
    shape: torch.Size


class _Gate(NamedTuple):
    """A call of softmax or sigmoid.

    Attributes:
        is_softmax: False for a sigmoid.
        size: the size of the softmax's dimension, or the number of the sigmoid's values.
        within: the children that were running.
    """

    is_softmax: bool
    size: int
    within: tuple[nn.Module, ...]


class _Watcher(TorchFunctionMode):
    """Records the calls of a module's children that hold convolutions, and those of gates."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self._gates: list[_Gate] = []
        self._running: list[tuple[nn.Module, Tensor | None, int]] = []
        self._inputs: list[Tensor] = []  # kept, so that no other tensor gets their storage
        names = _convs_of_children(module)
        children = {child for name, child in iter_children(module) if name in names}
        self._hooks = [
            hook
            for child in children
            for hook in (
                child.register_forward_pre_hook(self._enter, with_kwargs=True),
                child.register_forward_hook(self._leave),
            )
        ]

    def remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        self._running.append((child, x, 0 if x is None else x._version))

    def _leave(self, child: nn.Module, args: tuple[Any, ...], out: object) -> None:
        _, x, version = self._running.pop()
        if x is not None and isinstance(out, Tensor):
            self._inputs.append(x)
            source = (x.untyped_storage().data_ptr(), version)
            self.calls.append(_Call(child, source, out.shape))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _SOFTMAXES or name in _SIGMOIDS:
            x = args[0] if args else kwargs["input"]
            size = x.numel()
            if name in _SOFTMAXES:
                dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
                # Without dim, F.softmax takes these.
                size = x.shape[(0 if x.dim() in (0, 1, 3) else 1) if dim is None else dim]
            within = tuple(child for child, _, _ in self._running)
            self._gates.append(_Gate(name in _SOFTMAXES, size, within))
        return func(*args, **kwargs)

    def has_gates(self) -> bool:
        """Return whether there are branches, and a gate over them."""
        groups: dict[tuple[tuple[int, int], torch.Size], set[nn.Module]] = {}
        for child, source, shape in self.calls:
            groups.setdefault((source, shape), set()).add(child)
        return any(
            self._are_gated(branches, shape)
            for (_, shape), branches in groups.items()
            if len(branches) > 1
        )

    def _are_gated(self, branches: set[nn.Module], shape: torch.Size) -> bool:
        gates = [gate for gate in self._gates if branches.isdisjoint(gate.within)]
        if any(gate.is_softmax and gate.size == len(branches) for gate in gates):
            return True
        # One value per image and channel, of one branch or of all.
        one = shape[:2].numel()
        all_of_them = one * len(branches)
        sizes = [g.size for g in gates if not g.is_softmax and g.size in (one, all_of_them)]
        return sum(sizes) >= all_of_them
