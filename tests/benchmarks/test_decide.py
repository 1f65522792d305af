"""Test the decisions of decide.py on CSV files whose winners are known."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path

import conv_cost
import decide
import pytest
import report
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epsanet_fused.backends.defaults import TailProblem, TailRule, look_up

GPU = "NVIDIA H200"
STAGES = ("S1", "S2", "S3", "S4")
MEMORY_FORMATS = ("nchw", "channels_last")
BATCHES = (1, 32, 128, 256)
BYTES = {"S1": 401408, "S2": 200704, "S3": 100352, "S4": 50176}  # a sample's in 16 bits
PROVIDERS = ("triton", "cuda:one_pass", "cuda:two_pass")
REFUSED = {"ok": "", "note": "the one-pass kernel needs a sample that fits in shared memory"}
WRONG = {"ok": False, "note": "WRONG: the error is over its bound, so it isn't timed"}


@pytest.fixture
def write_results(tmp_path):
    """Return a function that writes the files of a run on a GPU."""

    def write(results=(), costs=(), gpu=GPU, l2_bytes=0) -> Path:
        for name, rows, columns in (
            ("results.csv", results, report.COLUMNS),
            ("conv_cost.csv", costs, conv_cost.COLUMNS),
        ):
            common = dict.fromkeys(columns, "") | {"device": GPU, "cuda": "13.0"}
            if rows:
                report.write_csv(tmp_path / name, (common | r for r in rows), columns)
        environment = {"device": gpu, "capability": "9.0", "l2_bytes": l2_bytes}
        (tmp_path / "env.json").write_text(json.dumps(environment))
        return tmp_path

    return write


def as_columns(result: float | dict[str, object]) -> dict[str, object]:
    """Return the columns of a result: milliseconds, or REFUSED or WRONG."""
    if isinstance(result, dict):
        return result
    return {"ms_p20": 0.99 * result, "ms_p50": result, "ms_p80": 1.01 * result, "ok": True}


def tail(
    forward: Iterable[object],
    backward: Iterable[object],
    stage: str = "S4",
    batch: int = 128,
    dtype: str = "float16",
    memory_format: str = "nchw",
    cache: str = "cold",
) -> list[dict[str, object]]:
    """Return the rows of one tail from the result of each provider in both modes."""
    about = {"scope": "tail", "stage": stage, "batch": batch, "dtype": dtype}
    about |= {"layout": memory_format, "cache": cache}
    return [
        about | {"mode": mode, "provider": provider} | as_columns(result)
        for mode, results in (("inference", forward), ("backward", backward))
        for provider, result in zip(PROVIDERS, results, strict=True)
    ]


def pasted(lines: Iterable[str]) -> tuple[TailRule, ...]:
    """Evaluate the printed lines as a table."""
    source = [line for line in lines if line.startswith("    TailRule(")]
    return eval(f"({' '.join(source)})", {"TailRule": TailRule, "torch": torch})


def cells(lines: Iterable[str]) -> list[list[str]]:
    """Return the cells of the printed tables that are not empty."""
    return [re.split("  +", line.strip()) for line in "\n".join(lines).splitlines()]


def problem(
    stage: str, batch: int, dtype: str = "float16", memory_format: str = "nchw"
) -> TailProblem:
    itemsize = getattr(torch, dtype).itemsize
    sample_bytes = BYTES[stage] * itemsize // 2
    channels_last = memory_format == "channels_last"
    return TailProblem(90, channels_last, getattr(torch, dtype), sample_bytes, batch)


OUTCOMES = {
    "triton": (1.0, 1.2, 1.3),
    "cuda": (1.2, 1.0, 1.3),
    "cuda:two_pass": (1.3, 1.2, 1.0),
    "cuda by two passes": (1.2, REFUSED, 1.0),
    "not measured": None,
}


def test_pasted_rows_give_every_measured_tail_its_winner(write_results):
    grid = list(itertools.product(STAGES, BATCHES, ("float16", "float32"), MEMORY_FORMATS))

    @settings(max_examples=20, deadline=None)
    @given(st.lists(st.sampled_from(list(OUTCOMES)), min_size=len(grid), max_size=len(grid)))
    def check(outcomes):
        points = dict(zip(grid, outcomes, strict=True)) | {grid[0]: "triton"}
        rows = [
            row
            for point, outcome in points.items()
            if (times := OUTCOMES[outcome])
            for row in tail(times, times, *point)
        ]
        table = pasted(decide.decide(write_results(rows)))
        for point, outcome in points.items():
            if outcome != "not measured":
                found = look_up(problem(*point), table) or "triton"
                assert found == outcome.removesuffix(" by two passes")

    check()


def test_rows_end_with_what_was_measured_and_meet_at_the_geometric_mean(write_results):
    rows = []
    for stage, batch, memory_format in itertools.product(STAGES, BATCHES, MEMORY_FORMATS):
        times = OUTCOMES["cuda" if batch > 1 and stage in ("S3", "S4") else "triton"]
        if (stage, batch, memory_format) == ("S4", 32, "nchw"):
            times = (1.1, 1.0, 1.3)  # the worst point
        rows += tail(times, times, stage, batch, memory_format=memory_format)
    lines = decide.decide(write_results(rows))
    about = f"    # {GPU}: forward 1.10x, step 1.10x as fast as the next best, by 72 rows"
    row = '    TailRule(90, None, torch.float16, (50_176, 141_919), (6, 256), "cuda"),'
    assert lines[lines.index(about) + 1] == row
    assert pasted(lines) == (TailRule(90, None, torch.float16, (50176, 141919), (6, 256), "cuda"),)


@pytest.mark.parametrize(
    "forward, backward, winner",
    [
        ((1, 0.985, 1.3), (1, 0.985, 1.3), None),  # ties
        ((1, 0.5, 1.3), (1, 1.6, 1.7), None),  # the step is longer
        ((1, 0.8, 1.3), (1, 1.1, 1.7), "cuda"),  # the backward is longer, but not the step
        ((1, 1.005, 1.3), (1, 0.8, 1.3), "cuda"),  # the forward ties
        ((1, 1.1, 1.3), (1, 0.5, 1.3), None),  # the forward is longer
        ((1, 0.8, 0.79), (1, 0.8, 0.79), "cuda"),  # both variants win and tie
        ((1, 0.8, 0.7), (1, 0.8, 0.7), "cuda:two_pass"),
        ((1, 0.8, 0.9), (1, REFUSED, 0.9), "cuda"),  # forward by one pass, backward by two
        ((1, REFUSED, 0.9), (1, REFUSED, 0.9), "cuda"),  # by two passes in both
        ((1, WRONG, 0.9), (1, 0.5, 0.9), "cuda:two_pass"),
        ((1, WRONG, WRONG), (1, 0.5, 0.9), None),
        ((WRONG, 0.5, 0.9), (1, 0.5, 0.9), None),  # nothing to compare with
    ],
)
def test_backend_replaces_triton_where_neither_time_is_longer(
    forward, backward, winner, write_results
):
    table = pasted(decide.decide(write_results(tail(forward, backward))))
    assert look_up(problem("S4", 128), table) == winner


def test_next_best_is_another_backend_where_one_pass_refuses(write_results):
    times = (1.2, REFUSED, 1.0)
    lines = decide.decide(write_results(tail(times, times)))
    about = f"    # {GPU}: forward 1.20x, step 1.20x as fast as the next best, by 6 rows"
    assert about in lines


def test_forward_counts_warm_where_it_fits_into_l2_and_backward_cold(write_results):
    wins, loses = (1, 0.8, 1.3), (1, 1.2, 1.3)
    rows = [
        row
        for batch in (1, 128)
        for row in (
            *tail(loses, wins, batch=batch, cache="cold"),
            *tail(wins, (1, 9, 9), batch=batch, cache="warm"),
        )
    ]
    table = pasted(decide.decide(write_results(rows, l2_bytes=2 * BYTES["S4"])))
    assert look_up(problem("S4", 1), table) == "cuda"
    assert look_up(problem("S4", 128), table) is None


def test_ranges_leave_out_tails_that_were_not_measured(write_results):
    wins = (1, 0.8, 1.3)
    grid = {*itertools.product(STAGES, BATCHES)} - {("S2", 32)}
    rows = [row for point in grid for row in tail(wins, wins, *point)]
    table = pasted(decide.decide(write_results(rows)))
    assert {p: look_up(problem(*p), table) for p in grid} == dict.fromkeys(grid, "cuda")
    assert look_up(problem("S2", 32), table) is None


def test_tail_without_a_backward_is_shown_as_undecided(write_results):
    rows = tail((1, 0.8, 1.3), (1, 0.8, 1.3)) + tail((1, 0.8, 1.3), (1, 0.8, 1.3), "S3")[:3]
    lines = decide.decide(write_results(rows))
    assert ["nchw", "float16", "100_352", "?"] in cells(lines)
    assert look_up(problem("S3", 128), pasted(lines)) is None


def test_without_env_json_the_rows_are_for_any_gpu(write_results):
    folder = write_results(tail((1, 0.8, 1.3), (1, 0.8, 1.3)))
    (folder / "env.json").unlink()
    lines = decide.decide(folder)
    assert pasted(lines)[0].arch is None
    assert "Without an env.json the rows are for any GPU, and all times count cold." in lines


def norm_rows(fused=None, leave_out=()) -> list[dict[str, object]]:
    """Return rows of 1.2 ms for the parts and of 1 ms for the operator.

    ``fused`` has other results of the operator by stage and memory format.
    """
    about = {"scope": "norm", "mode": "training", "batch": 128, "dtype": "float16"}
    about |= {"cache": "cold", "backend": "triton"}
    rows = []
    for stage, memory_format in itertools.product(STAGES, MEMORY_FORMATS):
        if (stage, memory_format) in leave_out:
            continue
        point = about | {"stage": stage, "layout": memory_format}
        result = (fused or {}).get((stage, memory_format), 1.0)
        rows.append(point | {"provider": "apart"} | as_columns(1.2))
        rows.append(point | {"provider": "fused"} | as_columns(result))
    return rows


def test_norm_is_entered_where_it_is_nowhere_slower(write_results):
    lines = decide.decide(write_results(norm_rows({("S4", "nchw"): 1.19})))
    assert lines[-1] == '    "cuda": "triton",'
    assert lines[-2] == "S4 128 float16 nchw cold: 1.01x as fast as the three apart, a tie"
    assert lines[-3] == "1.01x as fast as the three apart, or more, by 16 rows"


@pytest.mark.parametrize(
    "rows, reason",
    [
        (
            norm_rows({("S2", "channels_last"): 1.5}),
            "S2 128 float16 channels_last cold: 0.80x as fast as the three apart",
        ),
        (norm_rows({("S1", "nchw"): WRONG}), "S1 128 float16 nchw cold: not timed, or wrong"),
        (norm_rows(leave_out=[("S3", "nchw")]), "S3 nchw: not reached"),
        (
            norm_rows(dict.fromkeys(itertools.product(STAGES, MEMORY_FORMATS), 1.2)),
            "a tie everywhere",
        ),
    ],
)
def test_norm_is_left_out_with_the_reason(rows, reason, write_results):
    lines = decide.decide(write_results(rows))
    at = lines.index("left out:")
    assert reason in lines[at:]
    assert not any(line.startswith('    "cuda"') for line in lines)


def conv_rows(kernel: int, memory_format: str, ms: dict[str, tuple[float, float, float]]):
    """Return the rows of one convolution from the milliseconds of each merge's three passes."""
    about = {"stage": "S1", "kernel": kernel, "batch": 32, "dtype": "float16"}
    about["layout"] = memory_format
    return [
        about
        | {"merge": merge, "merged_groups": groups, "pass": kind, "cudnn_benchmark": benchmark}
        | as_columns(time if benchmark else 0.001)
        for groups, (merge, times) in enumerate(ms.items(), 1)
        for kind, time in zip(("forward", "dgrad", "wgrad"), times, strict=True)
        for benchmark in (True, False)
    ]


def test_convolutions_get_the_fastest_merge_and_stages_the_faster_memory_format(write_results):
    rows = [
        *conv_rows(3, "nchw", {"as_is": (1, 1, 1)}),
        *conv_rows(5, "nchw", {"as_is": (1, 1, 1), "k8": (0.5, 2, 2)}),
        *conv_rows(7, "nchw", {"as_is": (1, 1, 1), "k8": (0.99, 0.3, 0.2), "k16": (2, 2, 2)}),
        *conv_rows(9, "nchw", {"as_is": (4, 4, 4), "k8": (2, 2, 2), "k16": (1, 1, 1)}),
        *(row for k in (3, 5, 7, 9) for row in conv_rows(k, "channels_last", {"as_is": (2, 2, 1)})),
    ]
    found = cells(decide.decide(write_results(costs=rows)))
    start = ["float16", "S1", "nchw"]
    assert ["inference", *start, "as_is", "k8 (2) 2.00x", "as_is", "k16 (3) 4.00x"] in found
    assert ["training", *start, "as_is", "as_is", "k8 (2) 2.01x", "k16 (3) 4.00x"] in found
    assert ["inference", "float16", "S1", "nchw 2.29x"] in found  # 8 / 3.5
    assert ["training", "float16", "S1", "nchw 1.91x"] in found  # 20 / 10.49


def test_stage_that_lacks_a_convolution_gets_no_memory_format(write_results):
    rows = [*conv_rows(3, "nchw", {"as_is": (1, 1, 1)}), *conv_rows(5, "nchw", {"k8": (1, 1, 1)})]
    rows += conv_rows(3, "channels_last", {"as_is": (1, 1, 1)})[:2]  # the forward only
    found = cells(decide.decide(write_results(costs=rows)))
    assert ["inference", "float16", "S1", "nchw", "as_is"] in found
    assert ["inference", "float16", "S1", "channels_last", "as_is"] in found
    assert ["training", "float16", "S1", "channels_last", "as_is"] not in found
    assert ["inference", "float16", "S1"] in found


def test_unusable_files_are_refused_by_name(write_results, tmp_path, capsys):
    def refused(folder: Path) -> str:
        with pytest.raises(SystemExit) as stopped:
            decide.main([str(folder)])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    assert "must be a folder, but" in refused(tmp_path / "nowhere")
    assert "holds neither results.csv nor conv_cost.csv" in refused(tmp_path)
    rows = tail((1, 0.8, 1.3), (1, 0.8, 1.3))
    assert "holds two rows of nchw float16 S4 128 inference cold" in refused(
        write_results(rows + rows)
    )
    other = {"device": "NVIDIA H100"}
    two = "must be of one GPU, but holds rows of NVIDIA H100 and NVIDIA H200"
    assert two in refused(write_results([rows[0] | other, *rows[1:]]))
    assert "its files are of NVIDIA H100 and NVIDIA H200" in refused(
        write_results(rows, gpu="NVIDIA H100")
    )
    cost = conv_rows(3, "nchw", {"as_is": (1, 1, 1)})
    folder = write_results(rows, [row | other for row in cost])
    assert "its files are of NVIDIA H100 and NVIDIA H200" in refused(folder)
    (folder / "results.csv").write_text("scope,device\ntail,NVIDIA H200\n")
    assert "results.csv: has no column layout, dtype, stage" in refused(folder)
    (folder / "results.csv").write_text("scope,device\n")
    assert "results.csv: holds no rows" in refused(folder)


def test_all_three_decisions_are_printed(write_results, capsys):
    tails = tail((1, 0.8, 1.3), (1, 0.8, 1.3))
    modules = [row | {"scope": "module"} for row in tails]  # must not count as tails
    results = [*tails, *modules, *norm_rows()]
    folder = write_results(results, conv_rows(3, "nchw", {"as_is": (1, 1, 1)}))
    assert decide.main([str(folder)]) == 0
    printed = capsys.readouterr().out
    for heading in ("CUDA_TABLE", "NORM_TABLE", "the conv plan"):
        assert f"== {heading}" in printed
    assert printed.startswith(f"{GPU}, by {folder}\n")
