"""Process group, random seeds, batch samplers and exit status, for one process or several.

A recipe runs as one process, or as several that ``torchrun`` starts. Its results don't depend on
the number of processes: the order of the samples depends on (seed, epoch), the augmentation of a
sample on (seed, epoch, index), and a step consists of the same micro-batches however many processes
share it.
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

# Long enough for work that the first process does alone, such as COCO's evaluation.
TIMEOUT = timedelta(hours=2)


class RunError(Exception):
    """An expected failure, reported as one line instead of a traceback; see ``run``."""

    status = 1
    in_every_process = True  # every process raises it, and the first one prints it for all

    def __init__(self, text: str) -> None:
        # A DataLoader raises a worker's error again, with the worker's traceback as its text.
        last = text.strip().splitlines()[-1]
        super().__init__(last.rpartition(f"{__name__}.{type(self).__name__}: ")[2])


class InputError(RunError):
    """An argument or a file that the recipe can't use."""

    status = 2


class SampleError(InputError):
    """A sample that can't be read; only the process that loads it raises this."""

    in_every_process = False


class DivergedError(RunError):
    """A loss that is no longer finite."""


class StoppedError(RunError):
    """A stop by SIGINT or SIGTERM."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


_stopped: list[StoppedError] = []  # one for each signal received


def run(program: str, body: Callable[[], None]) -> int:
    """Run a recipe's body and return its exit status; print a ``RunError`` as one line on stderr.

    SIGINT and SIGTERM raise ``StoppedError`` in ``body``, wherever it is.
    """
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:  # a DataLoader worker, just forked, still has this handler
            _stopped.append(StoppedError(number))
            raise _stopped[-1]

    _handle_signals(stop)
    try:
        body()
    except Exception as error:
        _handle_signals(signal.SIG_IGN)  # torchrun may send the signal again
        # The DataLoader workers end with this process; torch would report that as a failure.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if (reason := find_run_error(error)) is None:
            raise
        if _rank() == 0 or not reason.in_every_process:
            # The first process's progress bar may be open in the same terminal.
            start = "" if reason.in_every_process else "\n"
            print(f"{start}{program}: {reason}", file=sys.stderr, flush=True)
        return reason.status
    finally:
        _stopped.clear()
    return 0


def find_run_error(error: Exception) -> RunError | None:
    """Return the ``RunError`` that caused an error, or None if there is none.

    An error of another type may be caused by a signal: C++ code may wrap the ``StoppedError``, and
    a process fails in another way if the other processes were stopped first.
    """
    if isinstance(error, RunError):
        return error
    return _stopped[0] if _stopped else None


def _handle_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type's name if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from this one; the process of rank 0 prints and writes."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def print(self, text: str) -> None:
        """Print a line on stdout, once for all processes."""
        if self.is_first:
            print(text, flush=True)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Return the sum of the processes' tensors, in every process."""
        if self.size == 1:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values

    def all_gather(self, value: Any) -> list[Any]:
        """Return the picklable values of all processes in the order of rank, in every process."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values


@contextmanager
def init_distributed(device: str | None) -> Iterator[World]:
    """Join the process group if ``torchrun`` started this process; leave it after success.

    Args:
        device: "cpu", "cuda", ...; None selects cuda where it is available. With several processes,
            each takes the cuda device of its LOCAL_RANK.

    Raises:
        InputError: if the device isn't available, or isn't usable by several processes.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), _rank()
    if size > 1 and not {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        raise InputError(
            f"WORLD_SIZE is {size}, but RANK, LOCAL_RANK, MASTER_ADDR or MASTER_PORT is missing: "
            f"start this recipe with torchrun"
        )
    own = _device(device, size)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if size > 1:
        # With a device_id NCCL doesn't have to guess the device.
        device_id = own if own.type == "cuda" else None
        dist.init_process_group(
            "gloo" if device_id is None else "nccl", device_id=device_id, timeout=TIMEOUT
        )
    yield World(rank, size, own)
    # Not after a failure: the processes would wait for one another until the timeout.
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


def derive_seed(*numbers: int) -> int:
    """Return a 63-bit seed that depends on all of the integers and on their order."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class SeededDataset(Dataset[Any]):
    """A dataset indexed by (epoch, index) whose randomness depends only on (seed, epoch, index).

    Torch's CPU generator is seeded while a sample is made. Transforms must draw from that
    generator, as torchvision's do.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        before = torch.get_rng_state()
        # torch.manual_seed would change the accelerators' generators, too, and for good.
        torch.default_generator.manual_seed(derive_seed(self.seed, epoch, index))
        try:
            return self.dataset[index]
        finally:
            torch.set_rng_state(before)


class TrainingBatchSampler(Sampler[list[tuple[int, int]]]):
    """The micro-batches of this process in an epoch, as lists of (epoch, index).

    For a DataLoader of a ``SeededDataset``. Each step takes ``batch_size`` samples of the shuffled
    data; an incomplete last step is dropped. A step has ``world.size * accumulate`` micro-batches:
    the process of rank r runs ``accumulate`` of them in their order, from ``r * accumulate`` on.

    Args:
        count: the number of samples.
        batch_size: the samples of a step, over all processes.
        accumulate: the micro-batches of a step in each process.

    Raises:
        InputError: if the batch doesn't divide into micro-batches, or is larger than ``count``.
    """

    def __init__(
        self, count: int, batch_size: int, world: World, seed: int, accumulate: int
    ) -> None:
        micro_batches = world.size * accumulate
        if batch_size % micro_batches:
            raise InputError(
                f"--batch-size {batch_size} must divide into {micro_batches} equal micro-batches: "
                f"{world.size} processes, {accumulate} each (--accumulate)"
            )
        if batch_size > count:
            raise InputError(
                f"--batch-size {batch_size} is more than there are training images: {count}"
            )
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.micro_batch_size = batch_size // micro_batches
        self.first = world.rank * accumulate * self.micro_batch_size
        self.accumulate = accumulate
        self.steps = count // batch_size
        self.epoch = 0

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        order = torch.randperm(self.count, generator=generator).tolist()
        for step in range(self.steps):
            for k in range(self.accumulate):
                start = step * self.batch_size + self.first + k * self.micro_batch_size
                yield [(self.epoch, i) for i in order[start : start + self.micro_batch_size]]


class EvaluationBatchSampler(Sampler[list[int]]):
    """The evaluation batches of this process; together the processes have every sample once.

    The batches are those of a single process, distributed round-robin. The last one may be smaller,
    and a process may have one batch less than another.
    """

    def __init__(self, count: int, batch_size: int, world: World) -> None:
        starts = range(0, count, batch_size)[world.rank :: world.size]
        self.batches: Sequence[range] = [range(s, min(s + batch_size, count)) for s in starts]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(batch) for batch in self.batches)


def make_loader(
    dataset: Dataset[Any],
    batches: TrainingBatchSampler | EvaluationBatchSampler,
    workers: int,
    world: World,
    collate: Callable[[list[Any]], Any] | None = None,
) -> DataLoader[Any]:
    """Build a DataLoader with persistent workers that ignore SIGINT."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=world.device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=_init_worker,
        generator=torch.Generator(),  # else every epoch would draw from the global generator
    )


def _init_worker(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _worker_excepthook


def _worker_excepthook(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Don't print the errors of a connection that the main process closes when it is stopped.

    Errors of samples don't come here: the DataLoader passes them to the main process.
    """
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, traceback)
