"""Changes that people make to the layers of a model from optimize_for_inference.

Each is made to the plain model, too; both must compute the same afterwards.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers.networks import calibrate, fully_rewritten, small
from torch import Tensor, nn
from torch.nn.utils import prune

import epsanet_fused as ef
from epsanet_fused.inference import conv, optimize
from epsanet_fused.inference.blocks import Rewrites
from epsanet_fused.inference.rewrite import apply_rewrites, find_targets

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
BLOCK = "layer2.0"
LAYERS = (
    "conv1", "bn1", "relu", "maxpool", "layer2", BLOCK,
    *(f"{BLOCK}.{name}" for name in (
        "conv1", "bn1", "conv2", "conv2.conv_1", "conv2.conv_3", "conv2.se", "conv2.se.fc1", "bn2",
        "conv3", "bn3", "relu", "downsample", "downsample.0", "downsample.1",
    )),
)  # fmt: skip


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    """A plain model and the same with all rewrites."""
    plain = small()
    return plain.requires_grad_(False), fully_rewritten(X, plain).requires_grad_(False)


def assert_same(plain: nn.Module, fast: nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(fast(X), plain(X), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_hook_sees_and_changes_what_it_does_in_the_plain_model(pair, layer):
    seen: list[list[Tensor]] = []
    handles = []
    for model in pair:
        kept: list[Tensor] = []
        seen.append(kept)

        def change(_m: nn.Module, args: Any, out: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept += [args[0].clone(), out.clone()]
            return out * -0.5

        handles.append(model.get_submodule(layer).register_forward_hook(change))
    assert_same(*pair)
    assert len(seen[0]) == len(seen[1]) > 0
    for expected, found in zip(*seen, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    for handle in handles:
        handle.remove()
    assert_same(*pair)


@pytest.mark.parametrize("layer", LAYERS)
def test_what_a_hook_keeps_is_overwritten_no_more_than_in_the_plain_model(pair, layer):
    """An inplace ReLU writes to what a hook of the norm before it has kept."""
    is_kept = []
    for model in pair:
        kept: list[tuple[Tensor, Tensor]] = []
        model.get_submodule(layer).register_forward_hook(
            lambda _m, _a, out, kept=kept: kept.append((out, out.clone()))
        )
        with torch.no_grad():
            model(X)
        is_kept.append([torch.equal(now, then) for now, then in kept])
    assert is_kept[0] == is_kept[1] and is_kept[0]


@pytest.mark.parametrize("layer", [name for name in LAYERS if name != "maxpool"])
def test_a_replaced_forward_is_called(pair, layer):
    for model in pair:
        module = model.get_submodule(layer)
        module.forward = partial(lambda forward, x: forward(x) * -0.5, module.forward)
    assert_same(*pair)


def another_norm(path: str, model: nn.Module) -> None:
    old: Any = model.get_submodule(path)
    made = nn.BatchNorm2d(old.num_features).eval()
    nn.init.uniform_(made.running_mean, -1, 1)
    model.set_submodule(path, made)


def set_eps(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 0.5


def adapt_norms(names: tuple[str, ...], model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and (not names or name in names):
            module.train()


def prune_twice(model: nn.Module) -> None:
    layer: Any = model.get_submodule(f"{BLOCK}.conv1")
    for amount in (0.3, 0.5):
        prune.l1_unstructured(layer, "weight", amount)
        model(X)
    layer.weight_mask[:4].zero_()


def forget_statistics(model: nn.Module) -> None:
    norm: Any = model.get_submodule(f"{BLOCK}.bn1")
    norm.running_mean = norm.running_var = None


def to_another(path: str, make: Callable[[], nn.Module], model: nn.Module) -> None:
    model.set_submodule(path, make().eval())


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "another norm in a block": partial(another_norm, f"{BLOCK}.bn1"),
    "another norm behind the PSA module": partial(another_norm, f"{BLOCK}.bn2"),
    "another norm in the stem": partial(another_norm, "bn1"),
    "another norm in the downsample": partial(another_norm, f"{BLOCK}.downsample.1"),
    "no norm in the stem": partial(to_another, "bn1", nn.Identity),
    "no norm in the downsample": partial(to_another, f"{BLOCK}.downsample.1", nn.Identity),
    "no activation in the stem": partial(to_another, "relu", nn.Identity),
    "another activation in the stem": partial(to_another, "relu", nn.GELU),
    "another activation in a block": partial(to_another, f"{BLOCK}.relu", nn.GELU),
    "another convolution": partial(
        to_another, f"{BLOCK}.conv1", lambda: nn.Conv2d(256, 64, 1, bias=False)
    ),
    "no block": partial(to_another, "layer2.1", nn.Identity),
    "eps": set_eps,
    "all norms in training mode": partial(adapt_norms, ()),
    "one norm in training mode": partial(adapt_norms, (f"{BLOCK}.bn1",)),
    "the stem's norm in training mode": partial(adapt_norms, ("bn1",)),
    "statistics removed": forget_statistics,
    "a layer more": lambda model: setattr(
        model.get_submodule(BLOCK), "drop_path", nn.Conv2d(256, 256, 1)
    ),
    "pruned twice": prune_twice,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_layer_counts(pair, change):
    with torch.no_grad():
        for model in pair:
            model(X)
            torch.manual_seed(0)
            CHANGES[change](model)
    assert_same(*pair)
    plain, fast = pair
    assert plain.state_dict().keys() == fast.state_dict().keys()


def test_changes_inside_a_model_that_was_changed_in_place():
    plain = small()
    model = copy.deepcopy(plain)
    made = fully_rewritten(X, model)
    model = optimize._move_into(model, made, None).requires_grad_(False)
    for m in (plain, model):
        m.relu = nn.GELU()
    assert_same(plain, model)


class Gelu(ef.EPSABlock):
    """Another activation, which a norm of zeros hides."""

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        gelu = nn.functional.gelu
        out = self.bn3(self.conv3(gelu(self.bn2(self.conv2(gelu(self.bn1(self.conv1(x))))))))
        return torch.relu(out + identity)


def with_relu6(model: nn.Module) -> None:
    for block in model.modules():
        if isinstance(block, ef.EPSABlock):
            block.relu = nn.ReLU6()


def with_hardsigmoid(model: nn.Module) -> None:
    for psa in model.modules():
        if isinstance(psa, ef.PSAModule):
            psa.se.sigmoid = nn.Hardsigmoid()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gelu", "relu6", "hardsigmoid"])
def test_what_present_weights_or_rounding_hide_is_found(kind, dtype):
    model: Any = small(Gelu) if kind == "gelu" else small()
    if kind != "gelu":
        (with_relu6 if kind == "relu6" else with_hardsigmoid)(model)
    for name, module in model.named_modules():
        if name.endswith("bn3"):
            nn.init.zeros_(module.weight)
    model = model.to(dtype)
    try:
        with torch.no_grad():
            targets = find_targets(model, (X.to(dtype),))
    except ValueError as error:
        assert "it computes something else" in str(error)
    else:
        assert not targets.blocks and "it computes something else" in str(targets.skipped)


def test_a_model_made_in_inference_mode_follows_its_parameters():
    with torch.inference_mode():
        model = calibrate(small(), torch.randn(4, 3, 64, 64))
        fast = fully_rewritten(X, model)
        fast(X)
    torch.manual_seed(5)
    other = small()
    with torch.inference_mode():
        fast.load_state_dict(other.state_dict())
        torch.testing.assert_close(fast(X), other(X), rtol=1e-3, atol=1e-4)


def test_only_the_norms_need_gradients(pair):
    _, fast = pair
    fast.get_submodule(f"{BLOCK}.bn1").requires_grad_(True)
    with pytest.raises(RuntimeError, match="has no gradients"):
        fast(X)


@pytest.mark.parametrize("over", ["input", "weights"])
def test_vmap_is_refused(pair, over):
    _, fast = pair
    weights = dict(fast.named_parameters())
    with torch.no_grad(), pytest.raises(RuntimeError, match="can't run under"):
        if over == "input":
            torch.func.vmap(lambda image: fast(image[None]))(X)
        else:
            two = {name: torch.stack([p, p]) for name, p in weights.items()}
            torch.func.vmap(lambda some: torch.func.functional_call(fast, some, (X,)))(two)


def test_gradients_of_a_head_behind_it(pair):
    plain, fast = pair
    head = torch.ones(plain(X).shape[1])
    with torch.no_grad():
        found = torch.func.grad(lambda w: (fast(X) @ w).sum())(head)
    torch.testing.assert_close(found, plain(X).sum(0), rtol=1e-3, atol=1e-4)


def test_forward_mode_is_refused(pair):
    _, fast = pair
    with pytest.raises(RuntimeError, match="has no gradients"):
        torch.func.jvp(fast, (X,), (torch.ones_like(X),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_with_a_stem_that_is_not_rewritten(dtype):
    plain = small()
    plain.conv1.register_forward_hook(lambda _m, _a, _o: None)
    with torch.no_grad():
        targets = find_targets(plain, (X,))
        fast = apply_rewrites(plain, targets, Rewrites(memory_format=torch.channels_last))
        fast(X)  # packs the weights
        with torch.autocast("cpu", torch.bfloat16):
            out, expected = fast(X.to(dtype)), plain(X.to(dtype))
    assert (out - expected).norm() <= 0.05 * expected.norm()


def test_a_thread_that_packs_old_weights_leaves_the_new_ones(monkeypatch):
    """Another thread loads weights and calls the model meanwhile."""
    layer: Any = conv.PlannedConv(nn.Conv2d(8, 8, 3), memory_format=torch.channels_last)
    x = torch.randn(1, 8, 8, 8).to(memory_format=torch.channels_last)
    pack = conv._pack

    def slowly(call: conv.ConvCall, x: Tensor) -> conv.ConvCall:
        monkeypatch.setattr(conv, "_pack", pack)
        with torch.no_grad():
            layer.weight.mul_(2)
        thread = threading.Thread(target=call_it)
        thread.start()
        thread.join()
        return pack(call, x)

    def call_it() -> None:
        with torch.no_grad():
            layer(x)

    monkeypatch.setattr(conv, "_pack", slowly)
    call_it()
    with torch.no_grad():
        expected = nn.functional.conv2d(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
