"""fuse: finds the PSA modules in anybody's model and puts fused ones in their place."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from epsanet_fused.backends import use_backend
from epsanet_fused.hooks import hooked
from epsanet_fused.modules import FusedPSAModule, is_psa
from epsanet_fused.progress import progress
from epsanet_fused.variants import Build, FusedPSAVariant, stand_in

ORDERS = ("reversed", "natural")
# In float64 the old and the new module differ by rounding alone.
TOLERANCE = 1e-9


def fuse(model: nn.Module, *, order: str = "reversed", dry_run: bool = False) -> nn.Module:
    """Put a fused module in the place of every PSA module (arXiv 2105.14447) of ``model``.

    PSA modules are recognised by what they are made of: two or more sibling convolutions of
    different kernels, groups or dilations, and an SE as wide as each of them, or one SE for each.
    Class names and the names of the parts don't matter. Kernels, groups, strides, biases and
    reduction are those of the parts. Convolutions may take all of the input or a share each, and
    may have a norm and an activation behind them.

    Each is first proved, on a copy with random weights in float64, to compute what its successor
    does: output, gradients, and what it does to its input. Whatever isn't proved stays as it is,
    with a warning that names it and says why.

    Parameters are shared: optimizers and EMA copies that hold them go on. Names, state_dict,
    device, dtype, training mode, hooks and other attributes stay; a module whose hooks would no
    longer be called is left alone.

    Args:
        model: any model. It is changed in place, after all of it has been looked at.
        order: "reversed" for PSA modules whose last branch comes first in the output, as in the
            official code; "natural" for those that concatenate in order. A state_dict can't tell.
        dry_run: change nothing, and print a table of what would be done.

    Returns:
        ``model``, or what replaces it if it is itself a PSA module.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: for another order, and if there is no PSA module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model must be a torch.nn.Module, got {type(model).__name__}")
    if order not in ORDERS:
        raise ValueError(f"fuse: order must be 'reversed' or 'natural', got {order!r}")
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    parts = {module: found for module in names if (found := find_parts(module)) is not None}
    if not parts and not any(isinstance(m, (FusedPSAModule, FusedPSAVariant)) for m in names):
        raise ValueError(
            f"fuse: model must hold a PSA module, sibling Conv2d layers and an SE as wide as each "
            f"of them, but {type(model).__name__} has none"
        )
    findings = _examine_all(parts, names, order == "reversed")
    if dry_run:
        print(_table([(names[m], m, parts[m], found) for m, found in findings.items()]))
        return model
    for module, finding in findings.items():
        for name in names[module]:
            if isinstance(finding, str):
                _warn(name, module, finding)
            elif name:
                model.set_submodule(name, finding)
            else:
                model = finding
    return model


def _examine_all(
    parts: dict[nn.Module, Parts], names: dict[nn.Module, list[str]], is_reversed: bool
) -> dict[nn.Module, nn.Module | str]:
    """For each module the one that takes its place, or why there is none."""
    items = progress(list(parts), "module", lambda m: f"examine {names[m][0] or 'the model'}")
    return {module: _examine(module, parts[module], is_reversed) for _, module in items}


class Parts(NamedTuple):
    """The names of what makes the branches, and of the two layers of each SE."""

    branches: tuple[str, ...]
    ses: tuple[tuple[str, str], ...]


def find_parts(module: nn.Module) -> Parts | None:
    """The parts of a PSA module, if this module has just these. Fused ones aren't looked at."""
    if isinstance(module, (FusedPSAModule, FusedPSAVariant)):
        return None
    branches: dict[str, nn.Conv2d] = {}
    ses: list[tuple[str, str]] = []
    width = None
    for name, child in _children(module):
        if next(child.parameters(), None) is None:
            continue
        if (layers := _se_layers(child)) is not None:
            ses.append((_join(name, layers[0]), _join(name, layers[1])))
            found, width = width, child.get_submodule(layers[0]).weight.shape[1]
            if found not in (None, width):
                return None
        elif (conv := _only_conv(child)) is not None:
            branches[name] = conv
        else:
            return None
    shapes = {(c.kernel_size, c.groups, c.dilation) for c in branches.values()}
    if len(branches) < 2 or len(ses) not in (1, len(branches)) or len(shapes) < 2:
        return None
    if any(conv.out_channels != width for conv in branches.values()):
        return None
    return Parts(tuple(branches), tuple(ses))


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children, those of lists by themselves."""
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from ((_join(name, inner), part) for inner, part in child.named_children())
        else:
            yield name, child


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def _layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers inside, and whatever else has parameters of its own."""
    kinds = (nn.Conv2d, nn.Linear)  # which have none where they are parametrised
    return {
        name: m
        for name, m in module.named_modules()
        if (m._parameters or isinstance(m, kinds)) and "parametrizations" not in name.split(".")
    }


def _se_layers(module: nn.Module) -> tuple[str, str] | None:
    """The names of the two layers if they are those of an SE: C -> R -> C, each pixel by itself."""
    layers = _layers(module)
    if len(layers) != 2:
        return None
    for layer in layers.values():
        pointwise = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)
        if not isinstance(layer, nn.Linear) and not (pointwise and layer.groups == 1):
            return None
    first, second = (layer.weight.shape[:2] for layer in layers.values())
    if first != second[::-1]:
        return None
    name1, name2 = layers
    return name1, name2


def _only_conv(module: nn.Module) -> nn.Conv2d | None:
    """The Conv2d inside, if there is one alone; norms may come with it."""
    norms = nn.modules.batchnorm._BatchNorm
    others = [m for m in _layers(module).values() if not isinstance(m, norms)]
    return others[0] if len(others) == 1 and isinstance(others[0], nn.Conv2d) else None


def _examine(module: nn.Module, parts: Parts, is_reversed: bool) -> nn.Module | str:
    """The module that can take the place of this one, or why there is none."""
    if "forward" in vars(module):
        return "its forward was replaced"
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "it is compiled; fuse the model first"
    called = {m for name in parts.branches for m in module.get_submodule(name).modules()}
    for name, part in module.named_modules():
        if part is not module and part not in called and hooked(part):
            return f"{name} has hooks, which would not be called any more"
    if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        return "it is on the meta device and can't be run"
    proof = prove(module, parts, is_reversed)
    return proof if isinstance(proof, str) else _successor(module, proof)


def _successor(module: nn.Module, build: Build) -> nn.Module:
    plain = not (build.split or build.relu or build.overwrites) and build.reversed
    official = is_psa(module) and build.branches == ("conv_1", "conv_2", "conv_3", "conv_4")
    if plain and official and module.se.fc1.bias is not None and module.se.fc2.bias is not None:
        return stand_in(module, FusedPSAModule)
    return FusedPSAVariant.standing_for(module, build)


def prove(module: nn.Module, parts: Parts, is_reversed: bool) -> Build | str:
    """The build whose fused module computes what this one does, or why there is none."""
    failures = []
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        try:
            twin = _random_twin(module)
        except Exception as error:  # what can be in a module that can't be copied is endless
            return f"it can't be copied: {_first_line(error)}"
        for split in (False, True):
            trials = list(itertools.product(_noise(twin, parts, split), (True, False)))
            try:
                results = [_run(twin, x, training) for x, training in trials]
            except Exception as error:  # also what a module raises is
                failures.append(_first_line(error))
                continue
            overwrites = not torch.equal(results[0].after, trials[0][0])
            for order, relu in itertools.product((is_reversed, not is_reversed), (False, True)):
                build = Build(*parts, split, relu, order, overwrites)
                if not _agrees(FusedPSAVariant.standing_for(twin, build), trials, results):
                    continue
                if order == is_reversed:
                    return build
                other = ORDERS[is_reversed]
                return f"its branches are in {other} order; fuse with order={other!r} takes it"
    if len(failures) == 2:
        return f"it can't be run on noise: {failures[0]}"
    return "it computes something else than a PSA module of such parts"


def _random_twin(module: nn.Module) -> nn.Module:
    """A copy in float64 in which no weight is zero, so that nothing can hide behind it."""
    twin = copy.deepcopy(module).double().requires_grad_()
    for part in twin.modules():
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            getattr(part, hooks).clear()
        part._backward_pre_hooks.clear()
    with torch.no_grad():
        for p in twin.parameters():
            p.copy_(torch.randn(p.shape, dtype=p.dtype, device="cpu") / max(p[0].numel(), 1) ** 0.5)
    return twin


def _noise(module: nn.Module, parts: Parts, split: bool) -> list[Tensor]:
    """Two small inputs (B, C_in, H, W), whose channels have different means."""
    convs = [_only_conv(module.get_submodule(name)) for name in parts.branches]
    channels = [conv.in_channels for conv in convs]
    padded = all(conv.padding != (0, 0) for conv in convs if conv.kernel_size != (1, 1))
    reach = max(d * k for c in convs for d, k in zip(c.dilation, c.kernel_size, strict=True))
    least = 3 if padded else reach
    inputs = []
    for B, H, W in ((2, least + 1, least + 4), (1, least + 3, least + 2)):
        C = sum(channels) if split else channels[0]
        x = torch.randn(B, C, H, W, device="cpu") + torch.randn(B, C, 1, 1, device="cpu")
        inputs.append(x.to(convs[0].weight))
    return inputs


class Result(NamedTuple):
    """What a module makes, what it leaves of its input, and the gradients if it has any."""

    out: Tensor
    after: Tensor
    grads: list[Tensor] | None


def _run(module: nn.Module, x: Tensor, training: bool) -> Result:
    module.train(training)
    buffers = [(b, b.clone()) for b in module.buffers()]
    leaves = [x.clone().requires_grad_(), *module.parameters()]
    given = leaves[0] * 1  # no leaf, which a module may not write over
    with torch.autocast(x.device.type, enabled=False), use_backend("reference"):
        out = module(given)
    if not isinstance(out, Tensor):
        raise TypeError(f"it returns a {type(out).__name__}")
    after = given.detach().clone()
    with torch.no_grad():
        for buffer, before in buffers:  # the statistics of a norm
            buffer.copy_(before)
    ramp = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    try:
        grads = torch.autograd.grad((out * ramp).sum(), leaves, allow_unused=True)
    except RuntimeError:  # it writes over what its own gradient needs
        return Result(out.detach(), after, None)
    return Result(out.detach(), after, [torch.zeros(()) if g is None else g for g in grads])


def _agrees(fused: nn.Module, trials: list[tuple[Tensor, bool]], results: list[Result]) -> bool:
    """Whether the fused module gives these results; gradients only where there were some."""
    for (x, training), true in zip(trials, results, strict=True):
        try:
            found = _run(fused, x, training)
        except (RuntimeError, ValueError):  # the branches don't fit together
            return False
        if not (_close(found.out, true.out) and _close(found.after, true.after)):
            return False
        if true.grads is None:
            continue
        if found.grads is None or not all(map(_close, found.grads, true.grads)):
            return False
    return True


def _close(a: Tensor, b: Tensor) -> bool:
    """Up to rounding in float64; what is no number never is."""
    if a.shape != b.shape:
        return False
    return bool((a - b).norm() <= TOLERANCE * b.norm() + 1e-12)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _warn(name: str, module: nn.Module, reason: str) -> None:
    text = f"fuse: {name or 'the model'} ({type(module).__name__}) is left alone: {reason}"
    warnings.warn(text, UserWarning, stacklevel=3)


def _table(
    rows: list[tuple[list[str], nn.Module, Parts, nn.Module | str]],
) -> str:
    """One line for each module: its name, what it is made of, and what becomes of it."""
    lines = [("module", "class", "kernels/groups", "SE", "input", "becomes")]
    for names, module, parts, finding in rows:
        convs = [_only_conv(module.get_submodule(name)) for name in parts.branches]
        kernels = " ".join(f"{'x'.join(map(str, c.kernel_size))}/{c.groups}" for c in convs)
        R, C = module.get_submodule(parts.ses[0][0]).weight.shape[:2]
        ses = f"{C}-{R}-{C}" if len(parts.ses) == 1 else f"{len(parts.ses)} x {C}-{R}-{C}"
        taken = "?"
        becomes = f"left alone: {finding}" if isinstance(finding, str) else type(finding).__name__
        if isinstance(finding, FusedPSAVariant):
            taken = "split" if finding.build.split else "whole"
        elif isinstance(finding, FusedPSAModule):
            taken = "whole"
        lines += [(n or ".", type(module).__name__, kernels, ses, taken, becomes) for n in names]
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[5]])
        for line in lines
    )
