"""Plans: measured once, right for any winner, and applied in training."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import epsanet_fused as ef
from epsanet_fused.inference import conv_planner
from epsanet_fused.inference.conv import PlannedConv
from epsanet_fused.inference.conv_planner import (
    ConvProblem,
    candidates,
    fastest,
    plan_convs,
    use_plans,
)
from epsanet_fused.nn.grouped_conv import ConvPlan
from epsanet_fused.utils.timing import summarise

NCHW, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_planner, "_plan_cache", {})
    monkeypatch.setattr(conv_planner, "SECONDS", 0.0)


def problem(**changes) -> ConvProblem:
    """Return the problem of a 9x9 convolution with 16 groups, with these changes."""
    default = ConvProblem(
        torch.device("cpu"),
        training=False,
        dtype=torch.float32,
        memory_format=NCHW,
        shape=(1, 64, 8, 8),
        channels=16,
        kernel=(9, 9),
        stride=(1, 1),
        padding=(4, 4),
        dilation=(1, 1),
        groups=16,
    )
    return default._replace(**changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [NCHW, CHANNELS_LAST], ids=str)
def test_every_candidate_gives_the_same_numbers(dtype, memory_format):
    p = problem(dtype=dtype, memory_format=memory_format)
    plans = candidates(p)
    assert plans[0] == ConvPlan(16, (1, 1), memory_format), "unchanged comes first"
    assert len(plans) == len(set(plans))
    assert {plan.memory_format for plan in plans} == {NCHW, CHANNELS_LAST}
    assert (2, 1) in {plan.tile for plan in plans}
    assert any(plan.tile == (2, 4) for plan in plans) == (dtype == torch.float32)
    conv, x = p.conv(), p.input()
    with torch.no_grad():
        expected = conv.double()(x.double())
        conv.to(dtype)
        for plan in plans:
            out = PlannedConv(conv, plan=plan, memory_format=memory_format)(x)
            assert out.is_contiguous(memory_format=memory_format)
            error = (out.double() - expected).abs().max()
            assert error <= 4 * torch.finfo(dtype).eps * expected.abs().max(), plan


def test_only_merges_are_candidates_in_training():
    plans = candidates(problem(training=True))
    assert plans == [ConvPlan(g, (1, 1), NCHW) for g in (16, 8, 4, 2, 1)]


def fake_timings(monkeypatch: pytest.MonkeyPatch, milliseconds) -> None:
    """Replace the measured time of each candidate by ``milliseconds(plan)``."""

    def interleave(variants, clock, reps, seconds):
        return {plan: summarise([milliseconds(plan)] * 9) for plan in variants}

    monkeypatch.setattr(conv_planner, "interleave", interleave)
    monkeypatch.setattr(conv_planner, "GIVE_UP_FACTOR", float("inf"))


def test_the_fastest_candidate_wins(monkeypatch):
    fake_timings(monkeypatch, lambda plan: 1.0 if plan == ConvPlan(8, (2, 1), NCHW) else 2.0)
    assert fastest(problem()) == ConvPlan(8, (2, 1), NCHW)
    fake_timings(monkeypatch, lambda plan: 1.0 if plan.groups == 2 else 2.0)
    assert fastest(problem(training=True)) == ConvPlan(2, (1, 1), NCHW)


def test_a_tie_leaves_the_convolution_unchanged(monkeypatch):
    fake_timings(monkeypatch, lambda plan: 1.0)
    assert fastest(problem()) == ConvPlan(16, (1, 1), NCHW)


def test_a_wrong_candidate_never_wins(monkeypatch):
    fake_timings(monkeypatch, lambda plan: 1.0 if plan.tile[1] == 8 else 2.0 + plan.groups / 100)
    original = PlannedConv.forward

    def forward(self, x, *args, **options):
        return original(self, x, *args, **options) * (1.001 if self.plan.tile[1] == 8 else 1)

    monkeypatch.setattr(PlannedConv, "forward", forward)
    assert fastest(problem()).groups == 1


def test_gradients_are_checked_in_training(monkeypatch):
    fake_timings(monkeypatch, lambda plan: float(plan.groups))
    assert fastest(problem(training=True)).groups == 1
    original = conv_planner.merged_conv

    def merged_conv(x, conv, groups):
        # With one group the output is right, but the gradient is a thousandth off.
        out = original(x, conv, groups)
        return out + 1e-3 * (out - out.detach()) if groups == 1 else out

    monkeypatch.setattr(conv_planner, "merged_conv", merged_conv)
    assert fastest(problem(training=True)).groups == 2


def test_plans_are_for_the_grouped_convolutions_of_psa_modules():
    model = nn.ModuleDict({"a": ef.PSAModule(64, 64), "other": nn.Conv2d(64, 64, 3, groups=4)})
    model.forward = lambda x: model["other"](model["a"](x))
    model.train()
    plans = plan_convs(model, torch.randn(1, 64, 8, 8))
    assert list(plans) == ["a.conv_2", "a.conv_3", "a.conv_4"]
    assert list(plan_convs(model["a"], torch.randn(1, 64, 8, 8))) == ["conv_2", "conv_3", "conv_4"]
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_planning_does_not_change_a_model_in_training():
    model = small().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan_convs(model, torch.randn(2, 3, 48, 40), training=True)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_model_made_in_inference_mode_can_be_planned():
    with torch.inference_mode():
        model = small().eval()
    versions = [p._version for p in small().buffers()]
    assert plan_convs(model, torch.randn(2, 3, 48, 40))
    other = small().eval()
    plan_convs(other, torch.randn(2, 3, 48, 40))
    assert [p._version for p in other.buffers()] == versions, "no buffer was written to"


def test_a_known_problem_is_not_measured_again(monkeypatch, tmp_path):
    module, file = ef.PSAModule(64, 64), tmp_path / "plans.json"
    x = torch.randn(1, 64, 8, 8)
    plans = plan_convs(module, x, file=file)
    measured = []

    def measure(problem):
        measured.append(problem)
        return ConvPlan(1, (1, 1), NCHW)

    monkeypatch.setattr(conv_planner, "fastest", measure)
    assert plan_convs(module, x) == plans
    monkeypatch.setattr(conv_planner, "_plan_cache", {})
    before = file.read_bytes()
    assert plan_convs(module, x, file=file) == plans
    assert file.read_bytes() == before
    assert not measured
    monkeypatch.setattr(conv_planner, "_plan_cache", {})
    new_problems = [
        lambda: plan_convs(module, torch.randn(2, 64, 8, 8), file=file),
        lambda: plan_convs(module, x, memory_format=CHANNELS_LAST, file=file),
        lambda: plan_convs(module, x.contiguous(memory_format=CHANNELS_LAST), training=True),
        lambda: plan_convs(module.double(), x.double(), file=file),
    ]
    for i, plan in enumerate(new_problems, 1):
        plan()
        assert len(measured) == 3 * i, "a new batch, memory format, mode or dtype is measured"
    assert len(json.loads(file.read_text())) == 12


def test_convolutions_are_measured_in_autocasts_dtype(monkeypatch):
    dtypes = []
    convolve = conv_planner.merged_conv

    def merged_conv(x, conv, groups):
        out = convolve(x, conv, groups)
        dtypes.append((x.dtype, conv.weight.dtype, out.dtype))
        return out

    monkeypatch.setattr(conv_planner, "merged_conv", merged_conv)
    with torch.autocast("cpu", torch.bfloat16):
        plan_convs(ef.PSAModule(64, 64), torch.randn(1, 64, 9, 9), training=True)
        plan_convs(ef.PSAModule(64, 64).double(), torch.randn(1, 64, 9, 9).double(), training=True)
    # The expected result in float32, the candidates in bfloat16; autocast ignores float64.
    assert {kinds[0] for kinds in dtypes} == {torch.float32, torch.bfloat16, torch.float64}
    assert all(len(set(kinds)) == 1 for kinds in dtypes)


def test_threads_and_versions_are_part_of_the_key(monkeypatch, threads):
    keys = {problem().key()}
    torch.set_num_threads(torch.get_num_threads() + 1)
    keys.add(problem().key())
    monkeypatch.setattr(torch, "__version__", "0.0")
    keys.add(problem().key())
    assert len(keys) == 3


def test_float32_counts_as_tf32_where_cudnn_may_use_it(monkeypatch):
    monkeypatch.setattr(conv_planner, "device_name", str)
    on_cuda = problem(device=torch.device("cuda"))
    assert on_cuda.eps == torch.finfo(torch.float16).eps
    assert on_cuda._replace(dtype=torch.float64).eps == torch.finfo(torch.float64).eps
    key = on_cuda.key()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert on_cuda.eps == problem().eps == torch.finfo(torch.float32).eps
        assert on_cuda.key() != key


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": [1, 2]}', '{"a": [1, 1, 1, "odd"]}'])
def test_a_file_without_plans_is_refused_and_kept(tmp_path, text):
    file = tmp_path / "plans.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"file must hold plans .*plans\.json"):
        plan_convs(ef.PSAModule(64, 64), torch.randn(1, 64, 8, 8), file=file)
    assert file.read_text() == text


def small(**options) -> ef.EPSANet:
    torch.manual_seed(0)
    return ef.EPSANet(ef.EPSABlock, (1, 1, 1, 1), 5, planes=(64, 64, 64, 128), **options)


def merges(model: nn.Module) -> dict[str, ConvPlan]:
    """Return a merge for each grouped convolution but the first."""
    names = [n for n, m in model.named_modules() if "conv_" in n and n[-1] in "234"]
    groups = {"2": 2, "3": 2, "4": 1}
    return {name: ConvPlan(groups[name[-1]]) for name in names[1:]}


def test_ten_training_steps_with_merged_groups_give_the_same_weights():
    """In float64, because training amplifies the rounding of float32."""
    results = []
    for merged in (False, True):
        model = small().double()
        if merged:
            use_plans(model, merges(model))
            assert model.layer2[0].conv2.merged_groups == (1, 2, 2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        generator = torch.Generator().manual_seed(1)
        losses = []
        for _ in range(10):
            images = torch.randn(4, 3, 48, 40, generator=generator).double()
            loss = nn.functional.cross_entropy(model(images), torch.arange(4))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        results.append((losses, model.state_dict()))
    (grouped_losses, grouped), (merged_losses, merged_state) = results
    assert merged_losses == pytest.approx(grouped_losses, rel=1e-9)
    for name, value in grouped.items():
        assert merged_state[name].shape == value.shape
        if value.is_floating_point():
            distance = (merged_state[name] - value).norm() / value.norm().clamp_min(1e-3)
            assert distance <= 1e-9, name


def test_plans_can_be_undone():
    model = small()
    use_plans(model, merges(model))
    use_plans(model, {})
    assert all(m.merged_groups is None for m in model.modules() if hasattr(m, "merged_groups"))


@pytest.mark.parametrize(
    ("plans", "says"),
    [
        ({"layer1.0.conv1": ConvPlan(1)}, r"plans must name .*layer1\.0\.conv2\.conv_1.*conv1"),
        ({"layer1.0.conv2.conv_4": ConvPlan(3)}, "divisor of 16 groups"),
        ({"layer1.0.conv2.conv_4": ConvPlan(4, (1, 2))}, "one pixel at a time"),
    ],
)
def test_nothing_changes_if_one_plan_does_not_fit(plans, says):
    model = small()
    with pytest.raises(ValueError, match=says):
        use_plans(model, merges(model) | plans)
    assert all(m.merged_groups is None for m in model.modules() if hasattr(m, "merged_groups"))


def test_tiles_of_a_cuda_device_fill_its_matrix_units():
    on_cuda = problem(dtype=torch.float16, device=torch.device("cuda"))
    tiled = [plan for plan in candidates(on_cuda) if plan.tile != (1, 1)]
    assert tiled
    for plan in tiled:
        rows, columns = plan.tile
        assert 32 <= rows * columns * on_cuda.channels // plan.groups <= 128


def test_the_plan_file_is_written_after_each_convolution(tmp_path, monkeypatch):
    path = tmp_path / "plans.json"
    counts = []

    def fastest(problem):
        counts.append(len(json.loads(path.read_text())) if path.exists() else 0)
        return ConvPlan(problem.groups)

    monkeypatch.setattr(conv_planner, "fastest", fastest)
    plan_convs(ef.PSAModule(64, 64), torch.randn(1, 64, 8, 8), file=path)
    assert counts == [0, 1, 2]
