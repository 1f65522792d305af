"""What the recipes share: how data are dealt, what a step adds up to, what a folder holds."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import record as records
import torch
import training
from helpers.processes import rows_of
from hypothesis import given
from hypothesis import strategies as st
from processes import (
    EvaluationBatches,
    InputError,
    RunError,
    SampleError,
    Seeded,
    TrainingBatches,
    World,
    make_loader,
    mix,
)
from torch import Tensor, nn
from torch.utils.data import Dataset

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


def worlds(size: int) -> list[World]:
    return [World(rank, size, CPU) for rank in range(size)]


def dealt(
    count: int, batch: int, size: int, accumulate: int, epoch: int
) -> list[list[tuple[int, int]]]:
    """The micro-batches of all processes, step by step and in a step by rank."""
    deals = [TrainingBatches(count, batch, w, 7, accumulate) for w in worlds(size)]
    for deal in deals:
        deal.epoch = epoch
    shares = [list(deal) for deal in deals]
    steps = range(0, len(shares[0]), accumulate)
    return [m for s in steps for share in shares for m in share[s : s + accumulate]]


@given(
    micro=st.integers(1, 4), size=st.integers(1, 4), accumulate=st.integers(1, 3),
    steps=st.integers(1, 4), rest=st.integers(0, 3), epoch=st.integers(0, 5),
)  # fmt: skip
def test_processes_and_micro_batches_share_the_steps_of_one(
    micro: int, size: int, accumulate: int, steps: int, rest: int, epoch: int
) -> None:
    batch = micro * size * accumulate
    count = batch * steps + min(rest, batch - 1)
    found = dealt(count, batch, size, accumulate, epoch)
    assert found == dealt(count, batch, 1, size * accumulate, epoch)
    assert {len(m) for m in found} == {micro}
    samples = [key for m in found for key in m]
    assert len(samples) == len(set(samples)) == batch * steps
    assert {key[0] for key in samples} == {epoch}
    assert {key[1] for key in samples} <= set(range(count))


def test_each_epoch_has_an_order_of_its_own() -> None:
    first, second = (dealt(50, 10, 1, 1, epoch) for epoch in (0, 1))
    assert [[i for _, i in m] for m in first] != [[i for _, i in m] for m in second]


@given(count=st.integers(0, 40), batch=st.integers(1, 9), size=st.integers(1, 5))
def test_an_evaluation_has_each_sample_once(count: int, batch: int, size: int) -> None:
    shares = [list(EvaluationBatches(count, batch, world)) for world in worlds(size)]
    alone = list(EvaluationBatches(count, batch, ALONE))
    assert sorted(i for share in shares for b in share for i in b) == list(range(count))
    assert sorted(b for share in shares for b in share) == alone
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


class Noise(Dataset[Tensor]):
    """Draws its items from torch's generator, as random transforms do."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        if index == 11:
            raise SampleError("sample 11 is broken")
        return index + torch.rand(3)


def test_a_sample_hangs_on_seed_epoch_and_index_alone() -> None:
    noise = Seeded(Noise(), 3)
    expected = {(e, i): noise[e, i] for e in range(2) for i in range(11)}
    assert len({tuple(x.frac().tolist()) for x in expected.values()}) == 22
    keys = list(expected)
    random.Random(0).shuffle(keys)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for key in keys:
        assert torch.equal(noise[key], expected[key])
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(Seeded(Noise(), 4)[0, 0], expected[0, 0])


@pytest.mark.parametrize("workers", [0, 2])
def test_neither_on_the_worker(workers: int) -> None:
    deal = TrainingBatches(8, 4, ALONE, 1, 1)
    loader = make_loader(Seeded(Noise(), 3), deal, workers, ALONE)
    before = torch.get_rng_state()
    for epoch in range(2):
        deal.epoch = epoch
        for keys, batch in zip(list(deal), loader, strict=True):
            assert torch.equal(batch, torch.stack([Seeded(Noise(), 3)[key] for key in keys]))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_worker_raises_keeps_its_one_line() -> None:
    batches = EvaluationBatches(12, 12, ALONE)
    with pytest.raises(SampleError) as caught:
        list(make_loader(Noise(), batches, 1, ALONE))
    assert str(caught.value) == "sample 11 is broken"


def test_mixed_seeds_differ() -> None:
    seeds = {mix(s, e, i) for s in range(8) for e in range(8) for i in range(8)}
    assert len(seeds) == 8**3
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mix(1, 23) != mix(12, 3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.norm(x)))


def make_trainer(**options: Any) -> training.Trainer:
    model = Net().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return training.Trainer(model, optimizer, ALONE, **options)


def square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def batches(count: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(5, 4, generator=g, dtype=torch.float64) for _ in range(count)]


def take(trainer: training.Trainer, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        trainer.step((0, step), batches(trainer.accumulate), square)


def test_running_statistics_move_by_the_mean_over_the_micro_batches() -> None:
    trainer = make_trainer(accumulate=3)
    take(trainer, 1)
    x = torch.stack(batches(3))  # (3, 5, 4)
    norm = trainer.model.norm
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean((0, 1)))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * x.var(1).mean(0))


def test_what_a_model_draws_hangs_on_the_step_alone() -> None:
    whole, parts, other = make_trainer(), make_trainer(), make_trainer(seed=1)
    take(whole, 4)
    take(other, 4)
    take(parts, 2)
    torch.rand(100)
    take(parts, 2, start=2)
    torch.testing.assert_close(parts.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    assert not torch.equal(whole.model.fc.weight, other.model.fc.weight)


def test_means_are_over_samples() -> None:
    means = training.Means(ALONE, "loss")
    means.add(3, loss=torch.tensor(6.0))
    means.add(1, loss=torch.tensor(4.0))
    assert means.finite("loss") == 2.5
    means.add(1, loss=torch.tensor(float("inf")))
    with pytest.raises(RunError, match="the loss became inf"):
        means.finite("loss")


def make_record(folder: Path, resume: Path | None = None, **options: Any) -> records.Record:
    return records.Record(folder, ALONE, "net", options, resume)


def test_the_best_is_kept_and_the_log_has_a_row_an_epoch(tmp_path: Path) -> None:
    record, trainer = make_record(tmp_path / "a" / "b"), make_trainer()
    for score in (1.0, 3.0, 2.0, 3.0):
        record.save(trainer, {"score": score}, score)
    best = torch.load(record.folder / "model_best.pth.tar", weights_only=True)
    assert (best["epoch"], best["best_prec1"]) == (2, 3.0)
    assert [row["epoch"] for row in rows_of(record.folder / "log.csv")] == ["1", "2", "3", "4"]


def test_resuming_an_earlier_checkpoint_drops_the_later_rows(tmp_path: Path, capsys) -> None:
    record, trainer = make_record(tmp_path, lr=0.1), make_trainer()
    for score in (1.0, 3.0, 2.0):
        record.save(trainer, {"score": score}, score)
    best = tmp_path / "model_best.pth.tar"
    again = make_record(tmp_path, best, lr=0.2)
    again.resume(trainer, best)
    again.save(trainer, {"score": 5.0}, 5.0)
    assert [row["score"] for row in rows_of(tmp_path / "log.csv")] == ["1.0", "3.0", "5.0"]
    assert capsys.readouterr().out == (
        f"resuming {best} after epoch 2\nresuming: lr was 0.1, now it is 0.2\n"
    )


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_write_that_fails_leaves_what_a_resumed_run_needs(
    writes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full after some of an epoch's three files."""
    record, trainer = make_record(tmp_path), make_trainer()
    record.save(trainer, {"score": 1.0}, 1.0)
    write, left = records.write_atomically, [None] * writes

    def full(path: Path, data: bytes) -> None:
        if not left:
            raise OSError(28, "No space left on device")
        left.pop()
        write(path, data)

    monkeypatch.setattr(records, "write_atomically", full)
    with pytest.raises(RunError, match="No space left"):
        record.save(trainer, {"score": 2.0}, 2.0)
    monkeypatch.undo()
    checkpoint = tmp_path / "checkpoint.pth.tar"
    again = make_record(tmp_path, checkpoint)
    again.resume(make_trainer(), checkpoint)
    assert (again.epoch, again.best) == (1, 1.0)
    again.save(trainer, {"score": 2.0}, 2.0)
    best = torch.load(tmp_path / "model_best.pth.tar", weights_only=True)
    assert (best["epoch"], best["best_prec1"]) == (2, 2.0)
    assert [row["score"] for row in rows_of(tmp_path / "log.csv")] == ["1.0", "2.0"]


def test_the_settings_of_the_command_line_outlive_a_resume(tmp_path: Path) -> None:
    record, trainer = make_record(tmp_path), make_trainer()
    take(trainer, 1)
    record.save(trainer, {}, 0.0)
    other = make_trainer()
    other.optimizer.param_groups[0]["momentum"] = 0.5
    other.resume(record.checkpoint)
    assert other.optimizer.param_groups[0]["momentum"] == 0.5
    torch.testing.assert_close(
        other.optimizer.state_dict()["state"], trainer.optimizer.state_dict()["state"]
    )


def _checkpoint(tmp_path: Path, **more: Any) -> Path:
    """In the official layout."""
    torch.save({"state_dict": Net().double().state_dict(), **more}, path := tmp_path / "file")
    return path


def test_all_that_a_checkpoint_lacks_is_said(tmp_path: Path, capsys) -> None:
    path = _checkpoint(tmp_path, epoch=4)
    record = make_record(tmp_path / "out", path)
    record.resume(make_trainer(ema_decay=0.9), path)
    said = capsys.readouterr().out
    for missing in ("average of the weights", "state of the optimizer", "best score", "log"):
        assert f"it has no {missing}" in said
    assert record.epoch == 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "holds no epoch; bare weights are for --weights"),
        ({"epoch": 1, "optimizer": {"state": {}}}, "its optimizer doesn't fit the model"),
    ],
)
def test_what_cannot_be_resumed(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = _checkpoint(tmp_path, **more)
    with pytest.raises(InputError, match=message):
        make_record(tmp_path / "out", path).resume(make_trainer(), path)


def test_a_momentum_of_another_shape_does_not_fit(tmp_path: Path) -> None:
    trainer = make_trainer()
    take(trainer, 1)
    state = trainer.optimizer.state_dict()
    state["state"][0], state["state"][2] = state["state"][2], state["state"][0]
    path = _checkpoint(tmp_path, epoch=1, optimizer=state)
    with pytest.raises(InputError, match=r"momentum_buffer is \(3, 4\) where the parameter is \(4"):
        make_trainer().resume(path)
