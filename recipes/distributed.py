"""One process or many: how they meet, how the data are dealt among them, how they end.

A recipe runs as one process, or as several that ``torchrun`` starts. All that decides its numbers
is the same for any number of processes: the order of the samples depends on (seed, epoch), a
sample's augmentation on (seed, epoch, its index), and a step's micro-batches are the same ones,
whoever runs them.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import arguments
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

# For the first process while it works alone, such as at COCO's evaluation.
PATIENCE = timedelta(hours=2)


class RunError(Exception):
    """The end of a run for a reason that is worth one line, not a traceback; see ``run``."""

    status = 1
    everywhere = True  # every process comes to it, and the first one says it for all

    def __init__(self, text: str) -> None:
        # A DataLoader makes another of what its workers raise, of their traceback.
        last = text.strip().splitlines()[-1]
        super().__init__(last.rpartition(f"{__name__}.{type(self).__name__}: ")[2])


class InputError(RunError):
    """What the user gave can't be used: argument, what came, what is accepted."""

    status = 2


class SampleError(InputError):
    """One sample can't be read: only the process that was dealt it knows."""

    everywhere = False


class DivergedError(RunError):
    """The loss isn't finite any more."""


class StoppedError(RunError):
    """SIGINT or SIGTERM came."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


_stopped: list[StoppedError] = []  # by the signals that came


def run(program: str, body: Callable[[], None]) -> int:
    """Run a recipe to its exit status; a ``RunError`` becomes one line on stderr.

    SIGINT and SIGTERM raise ``StoppedError`` in ``body``, wherever it is.
    """
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:  # and not a worker that was forked just now
            _stopped.append(StoppedError(number))
            raise _stopped[-1]

    _handle_signals(stop)
    try:
        body()
    except Exception as error:
        _handle_signals(signal.SIG_IGN)  # on the way out already, and torchrun may repeat itself
        # The workers of DataLoaders end with this process, and that is no failure of theirs.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if (reason := reason_of(error)) is None:
            raise
        if _rank() == 0 or not reason.everywhere:
            # The first process's bar may be open in the same terminal.
            start = "" if reason.everywhere else "\n"
            print(f"{start}{program}: {reason}", file=sys.stderr, flush=True)
        return reason.status
    finally:
        _stopped.clear()
    return 0


def reason_of(error: Exception) -> RunError | None:
    """The ``RunError`` behind an error: itself, or a stop that showed as something else.

    C++ code may wrap what a signal raises, and a process fails in another way if the others were
    stopped first.
    """
    if isinstance(error, RunError):
        return error
    return _stopped[0] if _stopped else None


def _handle_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def first_line(error: Exception) -> str:
    """What an error says, or its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


@dataclass(frozen=True)
class World:
    """This process, its device, and how many there are; ``rank`` 0 prints and writes."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """A line on stdout, once for all processes."""
        if self.is_first:
            print(text, flush=True)

    def total(self, values: Tensor) -> Tensor:
        """The sum of the processes' tensors, in every process."""
        if self.size == 1:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every process's picklable value by rank, in every process."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values


@contextmanager
def joined(device: str | None) -> Iterator[World]:
    """Meet the other processes that ``torchrun`` started, if it did; part again after success.

    Args:
        device: "cpu", "cuda", ...; None takes cuda where there is one. Of several processes each
            takes the cuda device of its LOCAL_RANK.

    Raises:
        InputError: if the device isn't there, or doesn't suit several processes.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), _rank()
    if size > 1 and not {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        raise InputError(f"WORLD_SIZE is {size}, but the rest is missing: start me with torchrun")
    own = _device(device, size)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if size > 1:
        # Bound to its device: NCCL needn't guess which one it is.
        bound = own if own.type == "cuda" else None
        dist.init_process_group(
            "gloo" if bound is None else "nccl", device_id=bound, timeout=PATIENCE
        )
    yield World(rank, size, own)
    # After a failure others may wait for this process in vain, and it for them: it just exits.
    if size > 1:
        dist.destroy_process_group()


def _device(name: str | None, size: int) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if size > 1:
        if ":" in name:
            raise InputError(
                f"--device {name} is one device, and there are {size} processes: each takes its "
                f"own of --device {name.partition(':')[0]}"
            )
        if name == "cuda":
            name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = arguments.device(name)
    except argparse.ArgumentTypeError as error:
        raise InputError(f"--device: {error}") from None
    if name == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def mix(*numbers: int) -> int:
    """A seed of 63 bits from several integers, each combination another one."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Seeded(Dataset[Any]):
    """A data set, indexed by (epoch, index), whose randomness hangs on (seed, epoch, index) alone.

    While a sample is made, torch's CPU generator stands at a seed of its own; transforms have to
    draw from that one, as torchvision's do.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        before = torch.get_rng_state()
        # Not torch.manual_seed, which would move the accelerators' generators for good.
        torch.default_generator.manual_seed(mix(self.seed, epoch, index))
        try:
            return self.dataset[index]
        finally:
            torch.set_rng_state(before)


class TrainingBatches(Sampler[list[tuple[int, int]]]):
    """This process's micro-batches of an epoch, as (epoch, index): for a DataLoader of ``Seeded``.

    Each step takes ``batch`` samples of the shuffled data, those of the last step that don't fill
    it are left out. They make ``world.size * accumulate`` micro-batches; the process of rank r runs
    those from ``r * accumulate`` on, in their order.

    Args:
        count: the number of samples.
        batch: the samples of a step, over all processes.
        accumulate: the micro-batches of a step in each process.

    Raises:
        InputError: if the batch doesn't divide into micro-batches, or is larger than ``count``.
    """

    def __init__(self, count: int, batch: int, world: World, seed: int, accumulate: int) -> None:
        parts = world.size * accumulate
        if batch % parts:
            raise InputError(
                f"--batch-size {batch} must divide into {parts} equal micro-batches: "
                f"{world.size} processes, {accumulate} each (--accumulate)"
            )
        if batch > count:
            raise InputError(
                f"--batch-size {batch} is more than there are training images: {count}"
            )
        self.count, self.batch, self.seed = count, batch, seed
        self.micro = batch // parts
        self.first = world.rank * accumulate * self.micro
        self.accumulate = accumulate
        self.steps = count // batch
        self.epoch = 0

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(mix(self.seed, self.epoch))
        order = torch.randperm(self.count, generator=generator).tolist()
        for step in range(self.steps):
            for k in range(self.accumulate):
                start = step * self.batch + self.first + k * self.micro
                yield [(self.epoch, i) for i in order[start : start + self.micro]]


class EvaluationBatches(Sampler[list[int]]):
    """This process's batches of an evaluation: every sample once in one of the processes.

    The batches are those that one process would see, dealt in turn. The last may be smaller, and
    processes may have one batch less than others.
    """

    def __init__(self, count: int, batch: int, world: World) -> None:
        starts = range(0, count, batch)[world.rank :: world.size]
        self.batches: Sequence[range] = [range(s, min(s + batch, count)) for s in starts]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(batch) for batch in self.batches)


def make_loader(
    dataset: Dataset[Any],
    batches: TrainingBatches | EvaluationBatches,
    workers: int,
    world: World,
    collate: Callable[[list[Any]], Any] | None = None,
) -> DataLoader[Any]:
    """A DataLoader whose workers stay from epoch to epoch, and leave a stop to this process."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=world.device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),  # or every epoch would draw a number from the global one
    )


def _begin_worker(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _excepthook_of_worker


def _excepthook_of_worker(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """A process that is stopped hangs up on its workers in the middle of a word: that is no news.

    What goes wrong with a sample doesn't come here, the DataLoader hands it on.
    """
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, traceback)
