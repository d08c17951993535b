"""A loader goes on behind the last batch that training has seen, as if nothing had happened."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
)

from distckpt import rng
from distckpt.formats import tree
from distckpt.loader_position import LoaderPosition

SIZE, BATCH = 23, 4  # six batches, the last of them smaller


class Numbers(Dataset):
    """Each with some noise, as a random transform would add it."""

    def __init__(self, noise: float = 0.5) -> None:
        self.noise = noise

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, at: int) -> float:
        return at + self.noise * (torch.rand(()).item() + random.random() + np.random.rand()) / 4


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(SIZE))


class MakesItsGenerator(RandomSampler):
    """As Accelerate's does, when it is iterated over first."""

    def __iter__(self) -> Iterator[int]:
        if self.generator is None:
            self.generator = own_generator()
        return super().__iter__()


def loader(**words: Any) -> DataLoader:
    return DataLoader(Numbers(), batch_size=BATCH, **words)


def own_generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


LOADERS = {
    "in order": lambda: loader(),
    "shuffled": lambda: loader(shuffle=True),
    "shuffled by a generator": lambda: loader(shuffle=True, generator=own_generator()),
    "sampler with a generator": lambda: loader(sampler=RandomSampler(range(SIZE), generator=own_generator())),
    "sampler that makes its generator": lambda: loader(sampler=MakesItsGenerator(range(SIZE))),
    "weighted": lambda: loader(sampler=WeightedRandomSampler([1.0 + n for n in range(SIZE)], SIZE)),
    "distributed": lambda: loader(sampler=DistributedSampler(range(SIZE), num_replicas=2, rank=1)),
    "sampler of batches": lambda: DataLoader(
        Numbers(), batch_sampler=BatchSampler(RandomSampler(range(SIZE)), BATCH, drop_last=True)
    ),
    "without batches": lambda: DataLoader(
        Numbers(), batch_size=None, sampler=RandomSampler(range(SIZE), num_samples=6)
    ),
    "last one dropped": lambda: loader(shuffle=True, drop_last=True),
}


class Training:
    """Looks at batches, and draws random numbers of its own beside each."""

    def __init__(self, made: DataLoader, ahead: int = 0) -> None:
        self.loader = made
        self.ahead = ahead
        self.fetched = 0
        self.is_at_end = False
        words = {"ahead": lambda: None if self.is_at_end else min(ahead, self.fetched)} if ahead else {}
        self.position = LoaderPosition(made, **words)

    def steps(self) -> Iterator[list[float]]:
        """What each step sees and draws, epoch after epoch."""
        while True:
            for batch in self._looking_ahead(iter(self.loader)):
                yield [
                    *torch.as_tensor(batch).reshape(-1).tolist(),
                    torch.rand(()).item(),
                    random.random(),
                    np.random.rand(),
                ]

    def _looking_ahead(self, batches: Iterator[Any]) -> Iterator[Any]:
        """As Accelerate does it."""
        self.fetched, self.is_at_end = 0, False
        kept = []
        for batch in batches:
            kept.append(batch)
            self.fetched += 1
            if len(kept) > self.ahead:
                yield kept.pop(0)
        self.is_at_end = len(kept) <= 1
        while kept:
            yield kept.pop(0)
            self.is_at_end = len(kept) <= 1

    def state(self) -> Any:
        """As it is in a checkpoint."""
        told, tensors, _ = tree.encode({"position": self.position.state_dict(), "rng": rng.capture()}, "loader")
        assert not tensors
        return told

    def load(self, told: Any) -> None:
        state = tree.decode(told, {}.__getitem__)
        self.position.load_state_dict(state["position"])
        rng.apply(state["rng"])


def seed(number: int = 0) -> None:
    torch.manual_seed(number), random.seed(number), np.random.seed(number)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("kind", LOADERS)
def test_each_step_after_a_resume_sees_and_draws_what_it_would_have(kind, ahead):
    seed()
    whole = list(islice(Training(LOADERS[kind](), ahead).steps(), 14))
    for done in range(1, 14):
        seed()
        first = Training(LOADERS[kind](), ahead)
        assert list(islice(first.steps(), done)) == whole[:done]
        told = first.state()
        seed(9)
        resumed = Training(LOADERS[kind](), ahead)
        resumed.load(told)
        assert list(islice(resumed.steps(), 14 - done)) == whole[done:], done


def test_a_run_may_be_resumed_again_and_again():
    seed()
    whole = list(islice(Training(loader(shuffle=True)).steps(), 14))
    seed()
    told, seen = None, []
    for _ in range(14):
        training = Training(loader(shuffle=True))
        if told is not None:
            seed(9)
            training.load(told)
            assert training.state() == told  # nobody has iterated yet
        seen += islice(training.steps(), 1)
        told = training.state()
    assert seen == whole


def test_what_lies_behind_is_not_read():
    class Watched(Numbers):
        def __getitem__(self, at: int) -> float:
            read.append(at)
            return float(at)

    read: list[int] = []
    position = LoaderPosition(DataLoader(Watched(), batch_size=BATCH))
    position.skip(3)
    list(position._loader)
    assert read == list(range(12, SIZE))


def test_a_stream_is_read_up_to_where_it_was():
    for done in range(7):
        first = DataLoader(Stream(), batch_size=BATCH)
        position = LoaderPosition(first)
        assert len(list(islice(first, done))) == done
        resumed = DataLoader(Stream(), batch_size=BATCH)
        LoaderPosition(resumed).load_state_dict(position.state_dict())
        rest = [batch.tolist() for batch in resumed]
        assert [one for batch in rest for one in batch] == (list(range(done * BATCH, SIZE)))


@pytest.mark.parametrize("persistent_workers", [False, True])
def test_workers_of_other_processes_go_on(persistent_workers):
    def made() -> DataLoader:
        words = {"shuffle": True, "num_workers": 2, "persistent_workers": persistent_workers}
        return DataLoader(Numbers(noise=0), batch_size=BATCH, **words)

    seed()
    whole = list(islice(Training(made()).steps(), 14))
    seed()
    first = Training(made())
    assert list(islice(first.steps(), 9)) == whole[:9]
    told = first.state()
    resumed = Training(made())
    seed(9)
    resumed.load(told)
    assert list(islice(resumed.steps(), 5)) == whole[9:]


@pytest.mark.parametrize("persistent_workers", [False, True])
def test_workers_of_other_processes_begin_the_next_epoch(persistent_workers):
    def epochs(made: DataLoader, count: int) -> list[Any]:
        return [([batch.tolist() for batch in made], torch.rand(()).item()) for _ in range(count)]

    def made() -> DataLoader:
        words = {"shuffle": True, "num_workers": 1, "persistent_workers": persistent_workers}
        return DataLoader(Numbers(noise=0), batch_size=BATCH, **words)

    seed()
    whole = epochs(made(), 4)
    seed()
    first = made()
    position = LoaderPosition(first)
    assert epochs(first, 2) == whole[:2]
    told, drawn = position.state_dict(), rng.capture()
    assert not told["is_begun"]
    seed(9)
    resumed = made()
    list(resumed)  # whoever looks at the data before
    LoaderPosition(resumed).load_state_dict(told)
    rng.apply(drawn)
    assert epochs(resumed, 2) == whole[2:]


@pytest.mark.parametrize("done", range(1, 6))
def test_loaders_side_by_side_draw_from_the_same_numbers(done):
    """Each draws its order when its first batch is asked for, and by then the other has drawn, too."""

    def steps(one: DataLoader, other: DataLoader) -> Iterator[Any]:
        batches, others = iter(one), iter(other)
        torch.rand(())  # and whatever else
        for batch in batches:
            yield batch.tolist(), next(others).tolist(), torch.rand(()).item()

    seed()
    whole = list(steps(loader(shuffle=True), loader(shuffle=True)))
    seed()
    two = loader(shuffle=True), loader(shuffle=True)
    positions = [LoaderPosition(one) for one in two]
    assert list(islice(steps(*two), done)) == whole[:done]
    told = [one.state_dict() for one in positions]
    drawn = rng.capture()
    seed(9)
    two = loader(shuffle=True), loader(shuffle=True)
    for one, state in zip(two, told, strict=True):
        LoaderPosition(one).load_state_dict(state)
    batches, others = map(iter, two)
    rng.apply(drawn)
    rest = [(batch.tolist(), next(others).tolist(), torch.rand(()).item()) for batch in batches]
    assert rest == whole[done:]


def test_the_state_is_that_of_the_loader_that_runs_and_not_of_one_before():
    made = loader()
    position = LoaderPosition(made)
    old = iter(made)
    next(old)
    new = iter(made)
    next(new), next(new)
    next(old)
    assert position.state_dict()["batches"] == 2


def test_another_position_takes_the_place_of_the_first():
    made = loader()
    LoaderPosition(made)
    position = LoaderPosition(made)
    position.skip(3)
    assert len(list(made)) == 3


def test_the_numbers_of_epochs_are_those_that_somebody_counts():
    made = loader()
    epoch = 7
    position = LoaderPosition(made, epoch=lambda: epoch)
    batches = iter(made)
    next(batches)
    assert (position.state_dict()["epoch"], position.state_dict()["batches"]) == (7, 1)
    list(batches)
    assert position.state_dict() == {"epoch": 8, "is_begun": False, "start": {"own": {}, "is_new": True}}


def test_where_nobody_does_they_are_counted():
    made = loader()
    position = LoaderPosition(made)
    list(made), list(made)
    next(iter(made))
    assert (position.state_dict()["epoch"], position.state_dict()["batches"]) == (2, 1)
    resumed = loader()
    later = LoaderPosition(resumed)
    later.load_state_dict(position.state_dict())
    assert len(list(resumed)) == 5
    assert later.state_dict()["epoch"] == 3


def test_other_attributes_of_an_iterator_are_there():
    made = loader()
    LoaderPosition(made)
    batches = iter(made)
    assert len(batches) == 6 and batches._num_workers == 0
