"""Branches and a gate over them are seen by running a module, which changes nothing."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.psa_variants import SE, OfficialPSA, assert_skipped
from torch import Tensor, nn

import epsanet_fused as ef
from epsanet_fused.fusion.watch import has_gated_branches

REASON = "it has several branches and a softmax or SE over them"


def pooled(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), *layers, nn.Sigmoid())


class Branches(nn.Module):
    """Convolutions of one input, gated by the softmax of an SE's output for each."""

    def __init__(self, se: nn.Module | None = None, conv: type[nn.Module] = nn.Conv2d) -> None:
        super().__init__()
        kernels = (3, 5, 7, 9)
        self.branches = nn.ModuleList(conv(64, 16, k, padding=k // 2) for k in kernels)
        self.se = se or SE(16)

    def gate(self, branch: Tensor) -> Tensor:
        return self.se(branch)

    def forward(self, x: Tensor) -> Tensor:
        made = [branch(x) for branch in self.branches]
        gates = torch.stack([self.gate(m) for m in made], 1).softmax(1)
        return torch.cat([m * gates[:, i] for i, m in enumerate(made)], 1)


class DirectLayers(Branches):
    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.fc1, self.fc2 = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)

    def gate(self, branch: Tensor) -> Tensor:
        return self.fc2(self.fc1(branch.mean((2, 3), keepdim=True)).relu()).sigmoid()


class SecondLayerFirst(Branches):
    def __init__(self) -> None:
        super().__init__(nn.ModuleDict({"fc2": nn.Conv2d(4, 16, 1), "fc1": nn.Conv2d(16, 4, 1)}))

    def gate(self, branch: Tensor) -> Tensor:
        return self.se["fc2"](self.se["fc1"](branch.mean((2, 3), keepdim=True)).relu())


class OnPooled(Branches):
    """Its gate takes vectors, not images."""

    def gate(self, branch: Tensor) -> Tensor:
        return self.se(branch.mean((2, 3)))[..., None, None]


class ECA(Branches):
    def __init__(self) -> None:
        super().__init__(nn.Conv1d(1, 1, 3, padding=1, bias=False))

    def gate(self, branch: Tensor) -> Tensor:
        return self.se(branch.mean((2, 3))[:, None])[:, 0, :, None, None].sigmoid()


class RawParameters(Branches):
    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.w1, self.w2 = nn.Parameter(torch.randn(4, 16)), nn.Parameter(torch.randn(16, 4))

    def gate(self, branch: Tensor) -> Tensor:
        hidden = F.linear(branch.mean((2, 3)), self.w1).relu()
        return F.linear(hidden, self.w2).sigmoid()[..., None, None]


class OneGateForAll(Branches):
    """The SE takes the concatenation of all branches; there is no softmax."""

    def __init__(self, groups: int) -> None:
        layers = nn.Conv2d(64, 16, 1, groups=groups), nn.ReLU(), nn.Conv2d(16, 64, 1, groups=groups)
        super().__init__(pooled(*layers))

    def forward(self, x: Tensor) -> Tensor:
        made = torch.cat([branch(x) for branch in self.branches], 1)
        return made * self.se(made)


class OnSlices(Branches):
    def __init__(self) -> None:
        super().__init__(pooled(nn.Conv2d(16, 16, 1)))

    def forward(self, x: Tensor) -> Tensor:
        slices = x.chunk(4, 1)
        made = [branch(part) for branch, part in zip(self.branches, slices, strict=True)]
        gates = F.softmax(torch.stack([self.se(m) for m in made]), 0)
        return torch.cat([m * g for m, g in zip(made, gates, strict=True)], 1)


class TwoEqual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.se = SE(16)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        gates = torch.softmax(torch.stack([self.se(a), self.se(b)], 1), dim=1)
        return torch.cat([b * gates[:, 1], a * gates[:, 0]], 1)


class SelectiveKernel(nn.Module):
    """Branches are summed, not concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=d, dilation=d) for d in (1, 2))
        self.fc = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 32))

    def forward(self, x: Tensor) -> Tensor:
        made = torch.stack([path(x) for path in self.paths], 1)
        gates = self.fc(made.sum(1).mean((2, 3))).view(-1, 2, 16).softmax(1)
        return (made * gates[..., None, None]).sum(1)


GATED: dict[str, Callable[[], nn.Module]] = {
    "layers of the SE are children of the module": DirectLayers,
    "the SE's second layer is registered first": SecondLayerFirst,
    "an SE with a norm": lambda: Branches(
        pooled(nn.Conv2d(16, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 16, 1))
    ),
    "an SE with a PReLU": lambda: Branches(
        pooled(nn.Conv2d(16, 4, 1), nn.PReLU(), nn.Conv2d(4, 16, 1))
    ),
    "an SE with a LayerNorm": lambda: Branches(
        pooled(nn.Conv2d(16, 4, 1), nn.LayerNorm([4, 1, 1]), nn.ReLU(), nn.Conv2d(4, 16, 1))
    ),
    "an SE of three layers": lambda: OnPooled(
        nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 16))
    ),
    "an SE of one layer": lambda: Branches(pooled(nn.Conv2d(16, 16, 1))),
    "an ECA": ECA,
    "parameters of its own": RawParameters,
    "a grouped SE over all branches": lambda: OneGateForAll(groups=4),
    "an SE over the concatenation": lambda: OneGateForAll(groups=1),
    "transposed convolutions": lambda: Branches(conv=nn.ConvTranspose2d),
    "two equal branches": TwoEqual,
    "a selective kernel": SelectiveKernel,
}


@pytest.mark.parametrize("name", GATED)
def test_gated_branches_with_other_layers_are_named(name: str) -> None:
    assert_skipped(GATED[name](), REASON)


def test_a_model_of_gated_branches_only_is_refused_and_they_are_named() -> None:
    model = nn.Sequential(nn.Sequential(SelectiveKernel()))
    with pytest.raises(ValueError, match=rf"has none \(0\.0: {REASON}"):
        ef.fuse(model)


def test_the_table_names_gated_branches(capsys: pytest.CaptureFixture[str]) -> None:
    ef.fuse(nn.Sequential(OfficialPSA(64, 64), TwoEqual()), dry_run=True)
    assert f"skipped: {REASON}" in capsys.readouterr().out


class OneSize(TwoEqual):
    """It has a table of positions, as some attentions have."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(14, 14))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.positions)


@pytest.mark.parametrize("make", [Branches, OnSlices, SelectiveKernel])
def test_gated_branches_are_seen(make: Callable[[], nn.Module]) -> None:
    assert has_gated_branches(make()) is True


def test_usual_sizes_are_tried_on_demand() -> None:
    assert has_gated_branches(OneSize()) is None
    assert has_gated_branches(OneSize(), try_sizes=True) is True


class TwoInputs(TwoEqual):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x + y)


class CallsNoChild(TwoEqual):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.a.weight) + F.conv2d(x, self.b.weight)


class OnMeta(TwoEqual):
    def __init__(self) -> None:
        with torch.device("meta"):
            super().__init__()


@pytest.mark.parametrize("make", [TwoInputs, CallsNoChild, OnMeta])
def test_what_cannot_be_watched_is_not_judged(make: Callable[[], nn.Module]) -> None:
    assert has_gated_branches(make()) is None


class NoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.widen = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("it was run")

    def __deepcopy__(self, memo: object) -> NoBranches:
        raise AssertionError("it was copied")


def test_a_module_of_no_equal_children_is_not_run() -> None:
    assert has_gated_branches(NoBranches()) is False


class Restless(TwoEqual):
    """It draws from each generator, keeps something, and warns."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        warnings.warn("restless", stacklevel=1)
        noise = torch.rand(()) + random.random() + np.random.rand()
        return super().forward(self.norm(x) * noise)


def test_watching_leaves_no_trace() -> None:
    model = Restless().train()
    hooked = []
    model.a.register_forward_hook(lambda *_: hooked.append(1))
    before = copy.deepcopy(model.state_dict()), dict(vars(model))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert has_gated_branches(model) is True
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    np.testing.assert_equal(np.random.get_state(legacy=False), states[2])
    assert vars(model) == before[1]
    assert not hooked
    torch.testing.assert_close(model.state_dict(), before[0], rtol=0, atol=0)
