"""Which samples are seen when: a function of the seed alone, whatever number of processes share
the work.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

__all__ = ["BatchOrder", "sample_rng", "share_of", "step_rng"]


def sample_rng(seed: int, epoch: int, index: int, *purpose: str | int) -> random.Random:
    """A generator that depends on its arguments alone, also across Python versions and machines.

    Each purpose has its own, so that switching one option on changes nothing that another draws.
    """
    key = ",".join(map(str, (seed, epoch, index, *purpose)))
    digest = hashlib.sha256(key.encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def step_rng(seed: int, epoch: int, batch: int, *purpose: str | int) -> random.Random:
    """The generator of what is drawn for a whole batch: a function of its place in the training, so
    that resuming draws what not stopping would have drawn, and every process draws the same.
    """
    return sample_rng(seed, epoch, batch, "step", *purpose)


def share_of(batch: Sequence[int], parts: int, part: int) -> list[int]:
    """One of ``parts`` equal shares of a batch.

    A share holds places symmetric to the middle of the batch, so that flipping the shares one by
    one pairs the same samples as flipping the batch: mixup and cutmix mix a clip with its partner
    in the flipped batch. Shares of an odd length are cut one after the other and pair others.
    """
    length = len(batch) // parts
    if parts == 1 or length % 2:
        return list(batch[part * length : (part + 1) * length])
    low, high = part * length // 2, (part + 1) * length // 2
    return [*batch[low:high], *batch[len(batch) - high : len(batch) - low]]


class BatchOrder(Sampler[list[tuple[int, int]]]):
    """A seeded permutation per epoch, cut into batches, from any batch on; the micro-batches of one
    process as lists of (epoch, index).

    A batch is what one optimiser step sees. It is divided evenly over ``processes`` and, on each,
    over ``accumulate`` micro-batches; which samples make a batch depends on neither. A last short
    batch is dropped, unless it is the only one.

    Args:
        length: number of samples.
        seed: of the permutations.
        batch_size: samples per optimiser step.
        processes, rank: how many share a batch, and which one this is.
        accumulate: micro-batches per step.

    Raises:
        ValueError: a batch cannot be divided evenly.
    """

    def __init__(
        self,
        length: int,
        seed: int,
        batch_size: int,
        *,
        processes: int = 1,
        rank: int = 0,
        accumulate: int = 1,
    ) -> None:
        parts = processes * accumulate
        if min(batch_size, length) % parts:
            raise ValueError(
                f"a batch of {min(batch_size, length)} cannot be divided by "
                f"{processes} processes x {accumulate} micro-batches"
            )
        self.length = length
        self.seed = seed
        self.batch_size = min(batch_size, length)
        self.processes = processes
        self.rank = rank
        self.accumulate = accumulate
        self.batches_per_epoch = length // self.batch_size
        self.epoch = 0
        self.start = 0

    def set_position(self, epoch: int, start: int = 0) -> None:
        """Continue with batch ``start`` of ``epoch``."""
        self.epoch = epoch
        self.start = start

    def samples(self, epoch: int) -> list[int]:
        """All samples of an epoch in order, those of a dropped last batch included."""
        order = list(range(self.length))
        sample_rng(self.seed, epoch, -1).shuffle(order)
        return order

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        order = self.samples(epoch)
        for number in range(self.start, self.batches_per_epoch):
            batch = order[number * self.batch_size : (number + 1) * self.batch_size]
            for micro in range(self.accumulate):
                part = micro * self.processes + self.rank
                yield [(epoch, i) for i in share_of(batch, self.processes * self.accumulate, part)]

    def __len__(self) -> int:
        return (self.batches_per_epoch - self.start) * self.accumulate
