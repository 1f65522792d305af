"""The CUDA kernels match the reference: an emulator runs their own sources on a CPU.

helpers/emulator/emulator.cpp lists the errors that the emulator reports and a GPU may hide.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.cases import (
    BRANCHES,
    DTYPES,
    GRADIENTS,
    MEMORY_FORMATS,
    SHAPES,
    SMALL,
    Case,
    Shape,
    assert_accurate,
    expected,
    make_case,
    named_case,
)
from helpers.emulator import harness
from helpers.emulator.harness import DeviceLimits, Emulator
from torch import Tensor

from epsanet_fused.testing.accuracy import bound, evaluate, max_error, plain_tail

AMPERE = DeviceLimits(80, 108, 163 * 1024, 164 * 1024)
TWO_PASSES = ["sum_rows", "recalibrate_runs"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if harness.compiler() is None:
        pytest.skip("compiling the kernels' sources for a CPU needs g++ or clang++")
    return harness.build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def emulator(library: Path, threads: None) -> Emulator:
    torch.set_num_threads(1)  # the tensors are too small for more
    return Emulator(library)


def one_pass_takes(shape: str, dtype: str, memory_format: str) -> bool:
    """Return True if samples are dense and begin at multiples of 16 bytes, in one memory format."""
    vector = 16 // DTYPES[dtype].itemsize
    _, _, C, H, W, *_ = SHAPES[shape]
    if memory_format == "channels_last" and H * W > 1:
        return C % vector == 0
    return C * H * W % vector == 0


@pytest.mark.parametrize("order", harness.ORDERS)
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_paths_match_the_oracle(
    emulator: Emulator, shape: str, dtype: str, memory_format: str, order: str
) -> None:
    case, oracle, plain = named_case(shape, dtype, memory_format)
    emulator.order = order
    paths = ["two_pass"]
    if one_pass_takes(shape, dtype, memory_format):
        paths.append("one_pass")
    for emulator.path in paths:
        assert_accurate(evaluate(emulator.psa_tail, *case), oracle, plain)


def check(emulator: Emulator, case: Case) -> list[Tensor]:
    results = evaluate(emulator.psa_tail, *case)
    assert_accurate(results, *expected(case))
    return results


def launches(emulator: Emulator, case: Case) -> tuple[list[str], list[str]]:
    """Return the names of the kernels of a forward and of a backward."""
    out, squeeze, attention = emulator.forward(case.branches, case.fc)
    forward = emulator.launches
    emulator.backward(case.grad, case.branches, squeeze, attention, case.fc)
    assert out.shape == case.grad.shape
    return forward, emulator.launches


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
def test_how_many_kernels_run(emulator: Emulator, memory_format: str) -> None:
    case = make_case(SMALL, torch.float16, MEMORY_FORMATS[memory_format])
    emulator.path = "two_pass"
    two = TWO_PASSES if memory_format == "nchw" else ["sum_columns", "recalibrate_columns"]
    assert launches(emulator, case) == (two, [*two, "fc_grad"])
    emulator.path = "one_pass"
    emulator.limits = DeviceLimits(multiprocessors=1)  # no need for clusters
    assert launches(emulator, case) == (["one_pass"], ["one_pass", "fc_grad"])
    _, squeeze, attention = emulator.forward(case.branches, case.fc)
    emulator.backward(case.grad, case.branches, squeeze, attention, case.fc, fc_grads=False)
    assert emulator.launches == ["one_pass"]


def test_automatic_takes_one_pass_where_it_can(emulator: Emulator) -> None:
    def kernel(case: Case, limits: DeviceLimits) -> str:
        emulator.limits = limits
        emulator.forward(case.branches, case.fc)
        return emulator.launches[0].partition("*")[0]

    dense = make_case(SMALL)
    assert kernel(dense, DeviceLimits()) == "one_pass"
    assert kernel(dense, AMPERE) == "sum_rows"
    assert kernel(dense, DeviceLimits(shared_per_block=1024)) == "sum_rows"
    assert kernel(
        dense._replace(branches=BRANCHES["mixed formats"](dense.branches)), DeviceLimits()
    ) == ("sum_columns")
    assert kernel(make_case(Shape(2, 4, 5, 3, 3, 1)), DeviceLimits()) == "sum_rows"  # odd samples


@pytest.mark.parametrize("order", harness.ORDERS)
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
@pytest.mark.parametrize("shape", ["S2", "S4", "5x9", "five branches", "C256"])
def test_one_pass_by_clusters(
    emulator: Emulator, shape: str, memory_format: str, order: str
) -> None:
    """Clusters of any size are right; they grow as long as multiprocessors are idle."""
    case, oracle, plain = named_case(shape, "fp16", memory_format)
    B = len(case.branches[0])
    emulator.path, emulator.order = "one_pass", order
    for cluster in (1, 2, 4, 8):
        emulator.limits = DeviceLimits(90, B * cluster, 2**19, 2**21)
        assert_accurate(evaluate(emulator.psa_tail, *case), oracle, plain)
        suffix = f"*{cluster}" if cluster > 1 else ""
        assert emulator.launches == [f"one_pass{suffix}", "fc_grad"]


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
@pytest.mark.parametrize(
    ("stage", "cluster"), [("S1", "*8"), ("S2", "*4"), ("S3", "*2"), ("S4", "")]
)
def test_clusters_grow_with_the_sample(
    emulator: Emulator, stage: str, cluster: str, memory_format: str
) -> None:
    case, _, _ = named_case(stage, "fp16", memory_format)
    emulator.limits = DeviceLimits(multiprocessors=1)
    emulator.forward(case.branches, case.fc)
    assert emulator.launches == [f"one_pass{cluster}"]


@pytest.mark.parametrize("path", ["one_pass", "two_pass"])
@pytest.mark.parametrize("multiprocessors", [1, 16, 1000])
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
def test_few_and_many_processors(
    emulator: Emulator, path: str, multiprocessors: int, memory_format: str
) -> None:
    """More multiprocessors: more splits, less work for each block, larger clusters."""
    emulator.path, emulator.limits = path, DeviceLimits(multiprocessors=multiprocessors)
    case, oracle, plain = named_case("S1", "fp16", memory_format)
    assert_accurate(evaluate(emulator.psa_tail, *case), oracle, plain)


@pytest.mark.parametrize("path", ["one_pass", "two_pass"])
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("shape", ["S1", "S3", "S4", "7x7"])
def test_all_traffic_is_wide(
    emulator: Emulator, shape: str, dtype: str, memory_format: str, path: str
) -> None:
    """All accesses are 16 bytes wide, even at 49 pixels.

    Two passes move 3 N bytes forward and 4 N backward, one pass 2 N and 3 N.
    """
    case, _, _ = named_case(shape, dtype, memory_format)
    emulator.path = path
    out, squeeze, attention = emulator.forward(case.branches, case.fc)
    N = out.nbytes
    # The first pass reads a vector that spans two rows once for each of them.
    rows = squeeze.numel() if path == "two_pass" and memory_format == "nchw" else 0
    least = 3 if path == "two_pass" else 2
    assert least * N <= emulator.wide_bytes <= least * N + 16 * rows
    emulator.backward(case.grad, case.branches, squeeze, attention, case.fc)
    assert (least + 1) * N <= emulator.wide_bytes <= (least + 1) * N + 2 * 16 * rows


def test_large_batches(emulator: Emulator) -> None:
    emulator.limits = DeviceLimits(multiprocessors=4)
    for emulator.path in ("two_pass", "one_pass"):
        for memory_format in MEMORY_FORMATS.values():
            check(emulator, make_case(Shape(33, 4, 16, 6, 6, 2), torch.bfloat16, memory_format))


@pytest.mark.parametrize("pixels", [*range(1, 20), 31, 33, 63, 65, 127, 255, 257, 300])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_all_lengths_of_rows(emulator: Emulator, pixels: int, dtype: str) -> None:
    """Vectors that span channels, misaligned samples, rows of one window and of many."""
    emulator.path = "two_pass"
    for C in (1, 3, 8):
        check(emulator, make_case(Shape(2, 3, C, 1, pixels, 2), DTYPES[dtype]))


@pytest.mark.parametrize("channels", [4, 8, 12, 24, 40, 72, 264, 520])
def test_all_widths_of_columns(emulator: Emulator, channels: int) -> None:
    for emulator.path in ("two_pass", "automatic"):
        shape = Shape(2, 3, channels, 3, 5, 2)
        check(emulator, make_case(shape, torch.float16, torch.channels_last))


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
@pytest.mark.parametrize("path", ["two_pass", "automatic"])
def test_many_branches(emulator: Emulator, path: str, memory_format: str) -> None:
    emulator.path = path
    check(
        emulator, make_case(Shape(2, 32, 8, 3, 3, 3), torch.float32, MEMORY_FORMATS[memory_format])
    )
    with pytest.raises(ValueError, match="up to 32 branches, not 33"):
        check(emulator, make_case(Shape(2, 33, 8, 3, 3, 3)))


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
def test_an_se_module_too_large_for_shared_memory(emulator: Emulator, memory_format: str) -> None:
    case = make_case(Shape(2, 4, 1800, 3, 2, 5), torch.float32, MEMORY_FORMATS[memory_format])
    emulator.limits = DeviceLimits(shared_per_block=48 * 1024)
    check(emulator, case)
    forward, backward = launches(emulator, case)
    assert forward[1] == backward[1] == "se_alone"


@pytest.mark.parametrize("order", ["forwards", "backwards"])
@pytest.mark.parametrize("view", BRANCHES.values(), ids=BRANCHES)
@pytest.mark.parametrize("shape", ["SMALL", "S4", "1x1", "B1"])
def test_any_strides_of_branches(
    emulator: Emulator, view: Callable[[list[Tensor]], list[Tensor]], shape: str, order: str
) -> None:
    case = make_case(SHAPES.get(shape, SMALL))
    branches = [as_pixels(x) for x in view(case.branches)]
    emulator.order = order
    check(emulator, case._replace(branches=branches, grad=as_pixels(case.grad)))


def as_pixels(x: Tensor) -> Tensor:
    """Return x as (B, C, 1, H * W), the shape that the kernels take."""
    try:
        return x.view(*x.shape[:2], 1, -1)
    except RuntimeError:  # a crop of a larger image, which the operator copies
        return x.flatten(2)[:, :, None]


@pytest.mark.parametrize("view", GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
def test_any_strides_of_the_gradient(
    emulator: Emulator, view: Callable[[Tensor], Tensor], memory_format: str
) -> None:
    case = make_case(SMALL, memory_format=MEMORY_FORMATS[memory_format])
    branches = [as_pixels(x) for x in case.branches]
    check(emulator, case._replace(branches=branches, grad=as_pixels(view(case.grad))))
    ones = torch.ones(()).expand(as_pixels(case.grad).shape)
    check(emulator, case._replace(branches=branches, grad=ones))


@pytest.mark.parametrize("skew", [1, 2, 3, 5, 7])
def test_samples_misaligned_to_each_other(emulator: Emulator, skew: int) -> None:
    """Branches and the gradient start at different offsets from multiples of 16 bytes."""
    emulator.path = "two_pass"
    case = make_case(Shape(2, 3, 5, 3, 7, 2), torch.float16)

    def shifted(t: Tensor, by: int) -> Tensor:
        return torch.cat([t.new_zeros(by), t.flatten()])[by:].view(t.shape)

    branches = [shifted(x, s * skew % 8) for s, x in enumerate(case.branches)]
    check(emulator, case._replace(branches=branches, grad=shifted(case.grad, skew)))


def test_weights_of_any_dtype_and_strides(emulator: Emulator) -> None:
    case = make_case(SMALL, torch.float16, fc_dtype=torch.float32)
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
    fc = [t.to(d) for t, d in zip(case.fc, dtypes, strict=True)]
    fc = [t.flatten(1).T.contiguous().T if t.dim() == 4 else t for t in fc]
    fc[1] = fc[1].repeat_interleave(2)[::2]
    case = case._replace(fc=fc)
    for emulator.path in ("one_pass", "two_pass"):
        results = evaluate(emulator.psa_tail, *case)
        assert [t.dtype for t in results[5:]] == list(dtypes)
        oracle, plain = expected(case)
        plain[5:] = [g.to(d) for g, d in zip(plain[5:], dtypes, strict=True)]
        assert_accurate(results, oracle, plain)


@pytest.mark.parametrize("path", ["one_pass", "two_pass"])
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
@pytest.mark.parametrize("requested", [[True, False, True, False], [False] * 4, []], ids=str)
@pytest.mark.parametrize("fc_grads", [True, False], ids=["fc", "no fc"])
def test_only_requested_gradients_are_written(
    emulator: Emulator, path: str, memory_format: str, requested: list[bool], fc_grads: bool
) -> None:
    case = make_case(SMALL, memory_format=MEMORY_FORMATS[memory_format])
    oracle, plain = expected(case)
    emulator.path = path
    _, squeeze, attention = emulator.forward(case.branches, case.fc)
    saved = (case.grad, case.branches, squeeze, attention, case.fc)
    if not requested and path == "one_pass":
        emulator.path = "automatic"
    grads, fc = emulator.backward(*saved, requested, fc_grads)
    assert [g is not None for g in grads] == requested
    assert len(fc) == 4 * fc_grads
    kept = [s for s, a in enumerate(requested) if a]
    results = [*(grads[s] for s in kept), *fc]
    indices = [1 + s for s in kept] + [5, 6, 7, 8] * fc_grads
    assert_accurate(results, [oracle[i] for i in indices], [plain[i] for i in indices])


@pytest.mark.parametrize("path", ["one_pass", "two_pass"])
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["branch", "fc1_weight", "fc2_bias"])
def test_nan_and_inf_spread_as_in_the_reference(
    emulator: Emulator, path: str, memory_format: str, poison: float, where: str
) -> None:
    case = make_case(SMALL, memory_format=MEMORY_FORMATS[memory_format])
    target = {"branch": case.branches[1], "fc1_weight": case.fc[0], "fc2_bias": case.fc[3]}[where]
    target[(0, 7, 0, 0) if target.dim() == 4 else 7] = poison
    emulator.path = path
    for result, plain in zip(
        evaluate(emulator.psa_tail, *case), evaluate(plain_tail, *case), strict=True
    ):
        torch.testing.assert_close(result, plain, equal_nan=True)


def test_infinite_neighbours_stay_out_of_a_row(emulator: Emulator) -> None:
    """Windows of 16 bytes include elements of neighbouring channels if rows have odd lengths."""
    emulator.path = "two_pass"
    case = make_case(Shape(2, 4, 8, 7, 7, 2), torch.float16)
    for x in case.branches:
        x[:, 3] = float("inf")
    case.grad[:, 5] = float("nan")
    for result, plain in zip(
        evaluate(emulator.psa_tail, *case), evaluate(plain_tail, *case), strict=True
    ):
        assert torch.equal(result.isnan(), plain.isnan())
    _, squeeze, _ = emulator.forward(case.branches, case.fc)
    assert squeeze.isinf().any(1).any(0).tolist() == [c == 3 for c in range(8)]


@pytest.mark.parametrize("path", ["one_pass", "two_pass"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
@pytest.mark.parametrize("options", ["scale", "shift", "relu", "scale shift relu"])
def test_epilogue(
    emulator: Emulator, path: str, dtype: str, memory_format: str, options: str
) -> None:
    case = make_case(SMALL, DTYPES[dtype], MEMORY_FORMATS[memory_format])
    channels = case.grad.shape[1]
    epilogue = {"scale": torch.randn(channels), "shift": torch.randn(channels), "relu": True}
    epilogue = {k: v for k, v in epilogue.items() if k in options.split()}
    exact = {k: v if v is True else v.double() for k, v in epilogue.items()}
    rounded = {k: v if v is True else v.to(DTYPES[dtype]) for k, v in epilogue.items()}
    branches, fc = case.branches, case.fc
    oracle = plain_tail([x.double() for x in branches], *(t.double() for t in fc), **exact)
    plain = plain_tail(branches, *fc, **rounded)
    emulator.path = path
    result = emulator.psa_tail(branches, *fc, **epilogue)
    assert max_error(result, oracle) <= bound(plain, oracle, DTYPES[dtype])


@pytest.mark.parametrize("path", ["one_pass", "two_pass"])
def test_epilogue_keeps_nan(emulator: Emulator, path: str) -> None:
    case = make_case(SMALL)
    case.branches[0][0, 0, 0, 0] = float("nan")
    emulator.path = path
    out = emulator.psa_tail(case.branches, *case.fc, relu=True)
    expected_nan = plain_tail(case.branches, *case.fc, relu=True).isnan()
    assert expected_nan.any()
    assert torch.equal(out.isnan(), expected_nan)


@pytest.mark.parametrize("path", ["one_pass", "two_pass"])
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
def test_the_same_bits_in_every_order_of_threads(
    emulator: Emulator, path: str, memory_format: str
) -> None:
    case = make_case(SHAPES["S3"], torch.float32, MEMORY_FORMATS[memory_format])
    emulator.path = path
    runs = []
    for emulator.order in [*harness.ORDERS, "forwards"]:
        runs.append(evaluate(emulator.psa_tail, *case))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_squeeze_and_attention_are_not_rounded(emulator: Emulator, dtype: str) -> None:
    branches, fc, _ = make_case(SHAPES["S2"], DTYPES[dtype])
    for emulator.path in ("one_pass", "two_pass"):
        _, squeeze, attention = emulator.forward(branches, fc)
        exact = torch.stack([x.double().mean((2, 3)) for x in branches], 1)  # (B, S, C)
        torch.testing.assert_close(squeeze.double(), exact, rtol=1e-6, atol=1e-6)
        hidden = torch.relu(exact @ fc[0].double().flatten(1).T + fc[1].double())
        gate = torch.sigmoid(hidden @ fc[2].double().flatten(1).T + fc[3].double())
        torch.testing.assert_close(attention.double(), gate.softmax(1), rtol=1e-5, atol=1e-6)


def test_dead_hidden_units_give_exactly_zero_gradients(emulator: Emulator) -> None:
    case = make_case(Shape(2, 4, 16, 6, 6, 1), torch.bfloat16)
    case.fc[1].fill_(-100.0)
    for emulator.path in ("one_pass", "two_pass"):
        _, *grads = evaluate(emulator.psa_tail, *case)
        assert not any(g.any() for g in grads[4:7])
        assert grads[7].any()


@pytest.mark.parametrize(
    ("case", "limits", "message"),
    [
        (make_case(SMALL), AMPERE, "compute capability 9.0"),
        (make_case(SMALL), DeviceLimits(shared_per_block=2048), "fits in shared memory"),
        (make_case(Shape(2, 4, 5, 3, 3, 1)), DeviceLimits(), "multiples of 16 bytes"),
        (
            make_case(SMALL)._replace(
                branches=BRANCHES["mixed formats"](make_case(SMALL).branches)
            ),
            DeviceLimits(),
            "dense branches in one memory format",
        ),
    ],
    ids=["arch", "too large", "misaligned", "mixed formats"],
)
def test_what_one_pass_refuses(
    emulator: Emulator, case: Case, limits: DeviceLimits, message: str
) -> None:
    emulator.path, emulator.limits = "one_pass", limits
    with pytest.raises(ValueError, match=message):
        emulator.forward(case.branches, case.fc)


def test_float64_is_refused(emulator: Emulator) -> None:
    case = make_case(SMALL, torch.float64)
    with pytest.raises(ValueError, match="float16, bfloat16 or float32, not float64"):
        emulator.forward(case.branches, case.fc)
