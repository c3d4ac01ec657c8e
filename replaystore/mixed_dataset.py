"""A torch dataset of several stores, of which the batches of a loader have given shares.

Its items are numbered dataset by dataset. A sampler of each dataset draws from its own items, in the
main process, and each part of a batch is read by its own dataset.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from replaystore.batches import Batches
from replaystore.dataset import ReplayDataset
from replaystore.errors import UsageError
from replaystore.index import EpisodeIndex
from replaystore.loader import Loadable, Loader
from replaystore.mixtures import (
    STORE_BIT,
    Mixture,
    check_alike,
    check_number,
    fill,
    interleaved,
    pairs,
    split,
)
from replaystore.recycler import Allocate
from replaystore.samplers import Draw, Sampler, Uniform
from replaystore.selection import check_sampler


class MixedDataset(Loadable):
    """Items of several stores in given shares: `MixedDataset([(online, 1), (demos, 3)])`.

    The parts are `ReplayDataset`s of stores with one schema, each with a `where` of its own. Their
    windows and transforms may differ, as long as what they give has the same names, shapes and
    dtypes. `ids` are told apart as those of `MixedStores`: `ids >> 60` is the number of the dataset
    in the list, `ids & (1 << 60) - 1` the id that it has there.
    `dataset[i]` counts through all items, dataset by dataset; only draws know of shares.
    """

    def __init__(self, datasets: Sequence[tuple[ReplayDataset, float]]) -> None:
        super().__init__()
        parts = pairs("MixedDataset", datasets)
        check_number("MixedDataset", len(parts))
        self._datasets = [_check_dataset(dataset) for dataset, _ in parts]
        self._shares = [share for _, share in parts]
        check_alike("MixedDataset", [dataset.store.schema for dataset in self._datasets])
        FromEach([Uniform() for _ in parts], self._shares)  # refuses wrong shares

    def refresh(self) -> None:
        """Move to the newest commits. Loaders with persistent workers must be made anew."""
        for dataset in self._datasets:
            dataset.refresh()

    def close(self) -> None:
        """Let the stores' files go; they are opened again when they are needed."""
        for dataset in self._datasets:
            dataset.close()

    @property
    def commit(self) -> int:
        """A checksum of the commits that the datasets show, to tell them from others."""
        return zlib.crc32(repr([dataset.commit for dataset in self._datasets]).encode())

    @property
    def items(self) -> "Indices":
        """The indices that samplers draw from."""
        return Indices([dataset.items for dataset in self._datasets])

    @property
    def takes_seeds(self) -> bool:
        """Whether an item may be read with a seed."""
        return any(dataset.takes_seeds for dataset in self._datasets)

    @property
    def together(self) -> int:
        """How many items the batches that are drawn and read together have."""
        return min(dataset.together for dataset in self._datasets)

    @property
    def item_nbytes(self) -> int:
        """Bytes of memory that an item may take."""
        return max(dataset.item_nbytes for dataset in self._datasets if len(dataset))

    def state_dict(self) -> dict[str, Any]:
        """The commits that the datasets show; torchdata brings them to the workers."""
        return {"heads": [dataset.state_dict()["heads"] for dataset in self._datasets]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Show the commits of a state, unless they are shown already."""
        heads = state["heads"]
        if not isinstance(heads, list) or len(heads) != len(self._datasets):
            found = f"those of {len(heads)}" if isinstance(heads, list) else "that of one"
            raise UsageError(f"state: expected the commits of {len(self._datasets)} datasets, got {found}")
        for dataset, each in zip(self._datasets, heads, strict=True):
            dataset.load_state_dict({"heads": each})

    def __len__(self) -> int:
        return sum(map(len, self._datasets))

    def read(
        self,
        numbers: np.ndarray,
        weights: np.ndarray | None = None,
        seeds: np.ndarray | None = None,
        allocate: Allocate | None = None,
    ) -> dict[str, Any]:
        """Items by number as nested arrays, transformed; with the weights and seeds that were drawn."""
        starts = np.cumsum([0, *map(len, self._datasets)])
        which = starts.searchsorted(numbers, side="right") - 1
        found, places = [], []
        for number in np.unique(which).tolist():
            here = np.flatnonzero(which == number)
            own = [None if each is None else each[here] for each in (weights, seeds)]
            arrays = self._datasets[number].read(numbers[here] - starts[number], *own)
            found.append(arrays | {"ids": arrays["ids"] | (number << STORE_BIT)})
            places.append(here)
        merged: dict[str, Any] = _merged(found, places, np.empty if allocate is None else allocate, "batch")
        return merged

    def batches(
        self,
        batch_size: int = 256,
        samplers: Sequence[Sampler] | None = None,
        *,
        seed: int | None = None,
        drop_last: bool = False,
    ) -> Batches:
        """A batch sampler, for a DataLoader of one's own, as `ReplayDataset.batches`."""
        sampler = self._sampler(samplers, seed)
        return Batches(self, batch_size, sampler=sampler, seed=seed, drop_last=drop_last, together=None)

    def loader(
        self,
        batch_size: int = 256,
        *,
        samplers: Sequence[Sampler] | None = None,
        seed: int | None = None,
        drop_last: bool = False,
        num_workers: int = 0,
        read_ahead: bool = False,
        **kwargs: Any,
    ) -> Loader:
        """A `DataLoader` of batches that have their shares of each dataset, exactly over several.

        A pass has as many items as all datasets together. Without `samplers`, one for each dataset,
        those of a dataset come in a random order, none twice before each has come once. The
        rest is as for `ReplayDataset.loader`.
        """
        sampler = self._sampler(samplers, seed)
        return self._loader(
            batch_size,
            sampler,
            seed=seed,
            drop_last=drop_last,
            num_workers=num_workers,
            read_ahead=read_ahead,
            **kwargs,
        )

    def _sampler(self, samplers: Sequence[Sampler] | None, seed: int | None) -> Sampler:
        """What is to draw, or `UsageError` if there is nothing to draw from."""
        for dataset in self._datasets:
            dataset.check_has_items()
        samplers = self._in_passes(seed) if samplers is None else samplers
        if len(samplers) != len(self._datasets):
            raise UsageError(f"samplers: expected {len(self._datasets)}, got {len(samplers)}")
        return FromEach([check_sampler(sampler) for sampler in samplers], self._shares)

    def _in_passes(self, seed: int | None) -> list[Sampler]:
        """A sampler without replacement for each dataset, each with a seed of its own."""
        seeds = np.random.default_rng(seed).integers(1 << 63, size=len(self._datasets)).tolist()
        return [Uniform(replace=False, seed=each) for each in seeds]


class Indices:
    """The indices of several datasets; items are numbered through them, one after the other."""

    def __init__(self, indices: Sequence[EpisodeIndex]) -> None:
        self.each = indices
        self.starts = np.cumsum([0, *map(len, indices)])

    def __len__(self) -> int:
        return int(self.starts[-1])


class FromEach(Mixture):
    """Draws from each of several indices by a sampler of its own, in shares."""

    def draw(self, items: Any, n: int, rng: np.random.Generator) -> Draw:
        """Draw n items of `Indices`."""
        draws = []
        for number, count in enumerate(split(n, self._shares, rng)):
            if count:
                draw = fill(self._samplers[number], items.each[number], count, rng)
                draws.append(
                    draw._replace(
                        numbers=draw.numbers + items.starts[number],
                        probabilities=self._shares[number] * draw.probabilities,
                    )
                )
        return interleaved(draws, rng)


def _merged(found: Sequence[Any], places: Sequence[np.ndarray], allocate: Allocate, name: str) -> Any:
    """Nested arrays of several datasets as one, with each array's rows at its places."""
    kinds = [_kind(each) for each in found]
    if kinds.count(kinds[0]) != len(kinds):
        kinds = list(dict.fromkeys(map(_described, found)))
        raise UsageError(
            f"MixedDataset: expected datasets whose windows and transforms give the same tensors, found"
            f" {name} to be {' and '.join(kinds)}"
        )
    if isinstance(found[0], dict):
        names = found[0]
        return {key: _merged([each[key] for each in found], places, allocate, key) for key in names}
    if isinstance(found[0], tuple):
        return tuple(_merged(parts, places, allocate, name) for parts in zip(*found, strict=True))
    merged = allocate((sum(map(len, found)), *found[0].shape[1:]), found[0].dtype)
    for array, here in zip(found, places, strict=True):
        merged[here] = array
    return merged


def _kind(value: Any) -> Any:
    """What has to be the same to be one tensor, or one dict or tuple of them."""
    if isinstance(value, dict):
        return value.keys()
    return len(value) if isinstance(value, tuple) else (value.dtype, value.shape[1:])


def _described(value: Any) -> str:
    if isinstance(value, dict):
        return f"a dict of {', '.join(sorted(value))}"
    return f"{len(value)} tensors" if isinstance(value, tuple) else f"{value.dtype} of {value.shape[1:]}"


def _check_dataset(dataset: Any) -> ReplayDataset:
    if not isinstance(dataset, ReplayDataset):
        raise UsageError(f"MixedDataset: expected datasets such as ReplayDataset(path), got {dataset!r}")
    return dataset
