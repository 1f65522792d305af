"""What people do to the layers of a fused module: it does what the plain module does."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import prune

import epsanet_fused as ef
from epsanet_fused.nn.grouped_conv import ConvPlan

Change = Callable[[ef.PSAModule], None]
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


class Adapter(nn.Module):
    """A layer with a low-rank addition, which shows the layer's weight as its own."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Conv2d(base.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def adapt(psa: ef.PSAModule) -> None:
    psa.se.fc2 = Adapter(psa.se.fc2)


def offload(psa: ef.PSAModule) -> None:
    """As packages do that load a layer's weights for the time of its call."""
    weight, forward = psa.se.fc1.weight.detach().clone(), psa.se.fc1.forward
    psa.se.fc1.weight = nn.Parameter(torch.empty_like(weight, device="meta"))

    def load_and_forward(x: Tensor) -> Tensor:
        psa.se.fc1.weight = nn.Parameter(weight)
        out = forward(x)
        psa.se.fc1.weight = nn.Parameter(torch.empty_like(weight, device="meta"))
        return out

    psa.se.fc1.forward = load_and_forward


def add_hook(layer: str) -> Change:
    def change(psa: ef.PSAModule) -> None:
        psa.get_submodule(layer).register_forward_hook(lambda _m, _args, out: out * 1.5)

    return change


def subclass(psa: ef.PSAModule) -> None:
    psa.se.fc1.__class__ = Doubled


def without_warning(change: Change) -> Change:
    def quiet(psa: ef.PSAModule) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            change(psa)

    return quiet


def widen_kernel(psa: ef.PSAModule) -> None:
    psa.se.fc1 = nn.Conv2d(16, 4, 3, padding=1)


def group(psa: ef.PSAModule) -> None:
    psa.se.fc1 = nn.Conv2d(16, 4, 1, groups=2)


CHANGES: dict[str, Change] = {
    "pruning": lambda psa: prune.l1_unstructured(psa.se.fc2, "weight", 0.5),
    "spectral norm by hooks": without_warning(
        lambda psa: torch.nn.utils.spectral_norm(psa.se.fc2.eval()) and None
    ),
    "weight norm by hooks": without_warning(
        lambda psa: torch.nn.utils.weight_norm(psa.se.fc2) and None
    ),
    "weight norm": lambda psa: torch.nn.utils.parametrizations.weight_norm(psa.se.fc1) and None,
    "an adapter": adapt,
    "offloading": offload,
    "a subclass": subclass,
    "another activation": lambda psa: setattr(psa.se, "sigmoid", nn.Hardsigmoid()),
    "a layer of 3 x 3": widen_kernel,
    "a layer with groups": group,
    "a hook on the SE": add_hook("se"),
    "a hook on a layer": add_hook("se.fc1"),
    "a hook on an activation": add_hook("se.relu"),
    "pruning of a convolution": lambda psa: prune.l1_unstructured(psa.conv_3, "weight", 0.5),
    "a hook on a convolution": add_hook("conv_2"),
    "another padding of a convolution": lambda psa: setattr(
        psa, "conv_2", nn.Conv2d(64, 16, 5, groups=4, padding=2, padding_mode="circular")
    ),
    "uneven padding of a convolution": lambda psa: setattr(
        psa, "conv_2", nn.Conv2d(64, 16, 4, groups=4, padding="same")
    ),
}


def pair(change: Change) -> tuple[ef.PSAModule, ef.FusedPSAModule]:
    made = []
    for kind in (ef.PSAModule, ef.FusedPSAModule):
        torch.manual_seed(0)
        psa = kind(64, 64, reduction=4)
        change(psa)
        made.append(psa)
    return made[0], made[1]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("planned", [False, True], ids=["", "merged groups"])
def test_two_steps_of_training_give_the_same(change: str, planned: bool) -> None:
    plain, fused = pair(CHANGES[change])
    if planned:
        ef.use_plans(fused, {f"conv_{i}": ConvPlan(1) for i in (2, 3, 4)})
    x = torch.randn(2, 64, 6, 6)
    for psa in (plain, fused):
        optimizer = torch.optim.SGD(psa.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            psa(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)
    state, expected = fused.state_dict(), plain.state_dict()
    if change != "offloading":  # its weights are on meta
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_decided_at_every_call(change: str) -> None:
    x = torch.randn(1, 64, 5, 5)
    fused = ef.FusedPSAModule(64, 64, reduction=4)
    assert fused.reads_se() and "tail=psa_tail" in repr(fused)
    before = fused(x)
    changed = copy.deepcopy(fused)
    CHANGES[change](changed)
    changed(x)
    if "convolution" not in change:
        assert not changed.reads_se() and "is modified" in repr(changed)
    torch.testing.assert_close(fused(x), before)


def test_a_hook_that_is_removed_leaves_no_trace() -> None:
    psa = ef.FusedPSAModule(64, 64)
    handle = psa.se.register_forward_hook(lambda *_: None)
    assert not psa.reads_se()
    handle.remove()
    assert psa.reads_se()


def test_a_global_hook_sees_all_layers() -> None:
    psa = ef.FusedPSAModule(64, 64)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        psa(torch.randn(1, 64, 4, 4))
    finally:
        handle.remove()
    assert {psa.se, psa.se.fc1, psa.se.fc2} < set(seen)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_hooks_in_a_network(training: bool) -> None:
    model = ef.EPSANet(ef.EPSABlock, (1, 1, 1, 1), 10).train(training)
    seen: list[str] = []
    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    model(torch.randn(2, 3, 64, 64))
    assert set(seen) == {name for name, m in model.named_modules() if name}


def test_no_plan_for_a_convolution_that_pads_in_another_way() -> None:
    psa = ef.FusedPSAModule(64, 64)
    CHANGES["another padding of a convolution"](psa)
    CHANGES["uneven padding of a convolution"](psa)
    psa.conv_3.padding_mode = "reflect"
    for training in (False, True):
        assert list(ef.plan_convs(psa, torch.randn(1, 64, 8, 8), training=training)) == ["conv_4"]


def test_merged_groups_are_scripted_and_traced_as_the_convolutions() -> None:
    plain, fused = pair(lambda _: None)
    ef.use_plans(fused, {f"conv_{i}": ConvPlan(1) for i in (2, 3, 4)})
    x = torch.randn(1, 64, 5, 5)
    for made in (torch.jit.script(fused), torch.fx.symbolic_trace(fused)):
        torch.testing.assert_close(made(x), plain(x), rtol=1e-4, atol=1e-5)


def test_a_modified_module_compiles_without_a_graph_break() -> None:
    psa = ef.FusedPSAModule(64, 64, reduction=4)
    x = torch.randn(1, 64, 5, 5)
    compiled = torch.compile(psa, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), psa(x))
    adapt(psa)
    torch.testing.assert_close(compiled(x), psa(x))
    torch.compiler.reset()


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(os.name == "nt", reason="gloo and files")
def test_sharding_each_layer_by_itself(one_process: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, x, results = init_device_mesh("cpu", (1,)), torch.randn(2, 3, 64, 64), []
    for fused in (False, True):
        torch.manual_seed(0)
        model = ef.EPSANet(ef.EPSABlock, (1, 1, 1, 1), 10, fused=fused)
        for layer in list(model.modules()):
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        out = model(x)
        out.sum().backward()
        results.append([out, model.layer1[0].conv2.se.fc1.weight.grad.full_tensor()])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
