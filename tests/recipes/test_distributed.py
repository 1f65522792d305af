"""Samplers, seeds and loaders give the same samples for any number of processes and workers."""

from __future__ import annotations

import random

import pytest
import torch
from distributed import (
    EvaluationBatchSampler,
    SampleError,
    SeededDataset,
    TrainingBatchSampler,
    World,
    derive_seed,
    make_loader,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset

CPU = torch.device("cpu")
ONE_PROCESS = World(0, 1, CPU)


def worlds(size: int) -> list[World]:
    return [World(rank, size, CPU) for rank in range(size)]


def micro_batches(
    count: int, batch_size: int, size: int, accumulate: int, epoch: int
) -> list[list[tuple[int, int]]]:
    """Return the micro-batches of all processes: step by step, and within a step by rank."""
    samplers = [TrainingBatchSampler(count, batch_size, w, 7, accumulate) for w in worlds(size)]
    for sampler in samplers:
        sampler.epoch = epoch
    per_rank = [list(sampler) for sampler in samplers]
    steps = range(0, len(per_rank[0]), accumulate)
    return [m for s in steps for batches in per_rank for m in batches[s : s + accumulate]]


@given(
    micro_batch_size=st.integers(1, 4),
    size=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    steps=st.integers(1, 4),
    rest=st.integers(0, 3),
    epoch=st.integers(0, 5),
)
def test_micro_batches_do_not_depend_on_the_number_of_processes(
    micro_batch_size: int, size: int, accumulate: int, steps: int, rest: int, epoch: int
) -> None:
    batch_size = micro_batch_size * size * accumulate
    count = batch_size * steps + min(rest, batch_size - 1)
    found = micro_batches(count, batch_size, size, accumulate, epoch)
    assert found == micro_batches(count, batch_size, 1, size * accumulate, epoch)
    assert {len(m) for m in found} == {micro_batch_size}
    samples = [key for m in found for key in m]
    assert len(samples) == len(set(samples)) == batch_size * steps
    assert {key[0] for key in samples} == {epoch}
    assert {key[1] for key in samples} <= set(range(count))


def test_each_epoch_has_an_order_of_its_own() -> None:
    first, second = (micro_batches(50, 10, 1, 1, epoch) for epoch in (0, 1))
    assert [[i for _, i in m] for m in first] != [[i for _, i in m] for m in second]


@given(count=st.integers(0, 40), batch_size=st.integers(1, 9), size=st.integers(1, 5))
def test_an_evaluation_has_each_sample_once(count: int, batch_size: int, size: int) -> None:
    per_rank = [list(EvaluationBatchSampler(count, batch_size, world)) for world in worlds(size)]
    single = list(EvaluationBatchSampler(count, batch_size, ONE_PROCESS))
    assert sorted(i for batches in per_rank for b in batches for i in b) == list(range(count))
    assert sorted(b for batches in per_rank for b in batches) == single
    assert max(map(len, per_rank)) - min(map(len, per_rank)) <= 1


class Noise(Dataset[Tensor]):
    """Items drawn from torch's generator, as random transforms draw."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        if index == 11:
            raise SampleError("sample 11 is broken")
        return index + torch.rand(3)


def test_a_sample_depends_on_seed_epoch_and_index_only() -> None:
    noise = SeededDataset(Noise(), 3)
    expected = {(e, i): noise[e, i] for e in range(2) for i in range(11)}
    assert len({tuple(x.frac().tolist()) for x in expected.values()}) == 22
    keys = list(expected)
    random.Random(0).shuffle(keys)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for key in keys:
        assert torch.equal(noise[key], expected[key])
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(SeededDataset(Noise(), 4)[0, 0], expected[0, 0])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_does_not_depend_on_the_worker(workers: int) -> None:
    sampler = TrainingBatchSampler(8, 4, ONE_PROCESS, 1, 1)
    loader = make_loader(SeededDataset(Noise(), 3), sampler, workers, ONE_PROCESS)
    before = torch.get_rng_state()
    for epoch in range(2):
        sampler.epoch = epoch
        for keys, batch in zip(list(sampler), loader, strict=True):
            expected = torch.stack([SeededDataset(Noise(), 3)[key] for key in keys])
            assert torch.equal(batch, expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_error_in_a_worker_keeps_its_one_line() -> None:
    sampler = EvaluationBatchSampler(12, 12, ONE_PROCESS)
    with pytest.raises(SampleError) as caught:
        list(make_loader(Noise(), sampler, 1, ONE_PROCESS))
    assert str(caught.value) == "sample 11 is broken"


def test_derived_seeds_differ() -> None:
    seeds = {derive_seed(s, e, i) for s in range(8) for e in range(8) for i in range(8)}
    assert len(seeds) == 8**3
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3)
