"""Checkpoints of the official script load; one that does not fit changes nothing."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import epsanet_fused as ef

State = dict[str, Tensor]


def make_model() -> ef.EPSABlock:
    return ef.EPSABlock(16, 64, downsample=nn.Conv2d(16, 256, 1))


@pytest.fixture
def state() -> State:
    """State of a trained model: every value differs from a new model's."""
    model = make_model()
    model(torch.randn(2, 16, 4, 4))  # updates the running statistics
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    return model.state_dict()


def prefixed(state: State) -> State:
    return {f"module.{key}": value for key, value in state.items()}


def official(state: State) -> dict[str, Any]:
    """A checkpoint as the official script saves it: DataParallel keys, a tensor, SGD's state."""
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.sum().backward()
    optimizer.step()
    return {
        "epoch": 120,
        "arch": "epsanet50",
        "state_dict": prefixed(state),
        "best_prec1": torch.tensor(77.49),
        "optimizer": optimizer.state_dict(),
    }


def assert_holds(model: nn.Module, state: State) -> None:
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_official_layout(tmp_path: Path, state: State, is_zip: bool) -> None:
    path, model = tmp_path / "model.pth.tar", make_model()
    torch.save(official(state), path, _use_new_zipfile_serialization=is_zip)
    rest = ef.load_checkpoint(model, path)
    assert_holds(model, state)
    assert list(rest) == ["epoch", "arch", "best_prec1", "optimizer"]
    assert (rest["epoch"], rest["arch"]) == (120, "epsanet50")
    assert rest["best_prec1"].item() == pytest.approx(77.49)
    assert torch.equal(rest["optimizer"]["state"][0]["momentum_buffer"], torch.ones(2))


@pytest.mark.parametrize("is_prefixed", [False, True], ids=["plain", "module."])
def test_bare_state_dict(tmp_path: Path, state: State, is_prefixed: bool) -> None:
    path, model = tmp_path / "state.pt", make_model()
    torch.save(prefixed(state) if is_prefixed else state, path)
    assert ef.load_checkpoint(model, str(path)) == {}
    assert_holds(model, state)


def compile_parts(model: nn.Module) -> nn.Module:
    model.conv2 = torch.compile(model.conv2, backend="eager")
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "a compiled part": compile_parts,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "both": lambda m: torch.optim.swa_utils.AveragedModel(torch.compile(m, backend="eager")),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model(tmp_path: Path, state: State, wrapper: str) -> None:
    model = make_model()
    model.load_state_dict(state)
    torch.save({"state_dict": WRAPPERS[wrapper](model).state_dict()}, tmp_path / "model.pt")
    loaded = make_model()
    ef.load_checkpoint(loaded, tmp_path / "model.pt")
    assert_holds(loaded, state)


MORE_WRAPPERS = WRAPPERS | {
    "DataParallel": nn.DataParallel,
    "AveragedModel compiled": lambda m: torch.compile(
        torch.optim.swa_utils.AveragedModel(m), backend="eager"
    ),
    "an average in DataParallel": lambda m: nn.DataParallel(torch.optim.swa_utils.AveragedModel(m)),
    "an average of another package": lambda m: nn.ModuleDict({"ema_model": nn.DataParallel(m)}),
}


@pytest.mark.parametrize("wrapper", MORE_WRAPPERS)
def test_into_a_wrapped_model(tmp_path: Path, state: State, wrapper: str) -> None:
    inner = make_model()
    wrapped = MORE_WRAPPERS[wrapper](inner)
    torch.save(wrapped.state_dict(), tmp_path / "wrapped.pt")
    torch.save(state, tmp_path / "plain.pt")
    own = {key: value.clone() for key, value in wrapped.state_dict().items()}
    ef.load_checkpoint(wrapped, tmp_path / "plain.pt")
    loaded = list(wrapped.state_dict().values())
    assert any(not torch.equal(a, b) for a, b in zip(loaded, own.values(), strict=True))
    ef.load_checkpoint(wrapped, tmp_path / "wrapped.pt")
    torch.testing.assert_close(dict(wrapped.state_dict()), own, rtol=0, atol=0)
    ef.load_checkpoint(make_model(), tmp_path / "wrapped.pt")


def test_options_of_a_training_script(tmp_path: Path, state: State) -> None:
    options = argparse.Namespace(lr=0.1, model="epsanet50")
    torch.save({"args": options, "model": "epsanet50", "state_dict_ema": state}, tmp_path / "m.pt")
    model = make_model()
    assert ef.load_checkpoint(model, tmp_path / "m.pt") == {"args": options, "model": "epsanet50"}
    assert_holds(model, state)


def test_norms_without_a_counter(tmp_path: Path) -> None:
    """As PyTorch wrote them before 0.4.1."""
    model = ef.EPSABlock(64, 64)
    state = {k: v + 1 for k, v in model.state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "old.pt")
    ef.load_checkpoint(model, tmp_path / "old.pt")
    assert torch.equal(model.bn1.weight, state["bn1.weight"])


@pytest.mark.parametrize("key", ["model", "state_dict_ema", "model_ema", "ema"])
def test_other_names_of_the_state_dict(tmp_path: Path, state: State, key: str) -> None:
    path, model = tmp_path / "model.pt", make_model()
    torch.save({"epoch": 3, key: prefixed(state)}, path)
    assert ef.load_checkpoint(model, path) == {"epoch": 3}
    assert_holds(model, state)


def test_keys_that_would_become_one_are_reported(tmp_path: Path, state: State) -> None:
    path, model = tmp_path / "model.pt", make_model()
    torch.save(state | {"_orig_mod.bn1.weight": torch.ones(64)}, path)
    with pytest.raises(ValueError, match=r"unexpected _orig_mod\.bn1\.weight"):
        ef.load_checkpoint(model, path)


def test_a_plain_checkpoint_loads_into_a_fused_network(tmp_path: Path) -> None:
    plain, fused = (
        ef.EPSANet(ef.EPSABlock, (1, 1, 1, 1), 5, planes=(64,) * 4, fused=fused).eval()
        for fused in (False, True)
    )
    torch.save(official(plain.state_dict()), tmp_path / "checkpoint.pt")
    ef.load_checkpoint(fused, tmp_path / "checkpoint.pt")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(fused(images), plain(images))


def without_key(state: State) -> None:
    del state["conv2.conv_2.weight"]


def with_extra_key(state: State) -> None:
    state["conv2.conv_5.weight"] = torch.zeros(1)


def with_wrong_shape(state: State) -> None:
    state["conv3.weight"] = torch.zeros(256, 32, 1, 1)


def with_all_three(state: State) -> None:
    without_key(state)
    with_extra_key(state)
    with_wrong_shape(state)


def empty(state: State) -> None:
    state.clear()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_key, r"missing conv2\.conv_2\.weight$"),
        (with_extra_key, r"unexpected conv2\.conv_5\.weight$"),
        (
            with_wrong_shape,
            r"conv3\.weight is \(256, 32, 1, 1\), the model's \(256, 64, 1, 1\)$",
        ),
        (with_all_three, r"missing conv2\S+; unexpected conv2\S+; conv3\.weight is"),
        (empty, "must hold a state_dict"),
    ],
)
def test_a_wrong_state_dict_changes_nothing(
    tmp_path: Path, state: State, damage: Callable[[State], None], message: str
) -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    damage(state)
    torch.save(official(state), tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=message):
        ef.load_checkpoint(model, tmp_path / "checkpoint.pt")
    assert_holds(model, before)


def test_error_names_the_file_and_stays_short(tmp_path: Path, state: State) -> None:
    torch.save({f"other.{key}": value for key, value in state.items()}, tmp_path / "other.pt")
    counters = sum(key.endswith("num_batches_tracked") for key in state)  # may be missing
    more = 2 * len(state) - counters - 6
    with pytest.raises(ValueError, match=rf"other\.pt does not fit the model: .* and {more} more$"):
        ef.load_checkpoint(make_model(), tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "must hold a dict, got list"),
        (torch.zeros(2), "must hold a dict, got Tensor"),
        ({}, "must hold a state_dict"),
        ({"epoch": 3, "arch": "epsanet50"}, r"found the keys \['arch', 'epoch'\]"),
        ({"state_dict": [torch.zeros(2)]}, r"found the keys \['state_dict'\]"),
        ({"state_dict": {"conv1.weight": 3}}, "must hold a state_dict"),
        ({"state_dict": {1: torch.zeros(2)}}, "must hold a state_dict"),
    ],
    ids=str,
)
def test_refuses_a_file_without_a_state_dict(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=message):
        ef.load_checkpoint(make_model(), tmp_path / "file.pt")


class Attack:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.path,)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_runs_no_code_from_the_file(tmp_path: Path, state: State, is_zip: bool) -> None:
    content = {"state_dict": state, "epoch": Attack(tmp_path / "attacked")}
    torch.save(content, tmp_path / "evil.pt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UnpicklingError):
        ef.load_checkpoint(make_model(), tmp_path / "evil.pt")
    assert not (tmp_path / "attacked").exists()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ef.load_checkpoint(make_model(), tmp_path / "none.pt")
