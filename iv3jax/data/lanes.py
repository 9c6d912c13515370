"""Lanes: each row of the global batch is filled from its own samples of the global order, and goes on exactly
after a stop. Reading a sample is read.py, what shares a row packing.py, the order mixture.py.

Of R rows, row r is lane r and takes the samples r, r + R, r + 2R, … of the order. What a lane does depends on
nothing else, so that hosts can share the lanes out as they like, and so can workers the reading.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from math import ceil

import numpy as np

from iv3jax.data.collate import collate
from iv3jax.data.config import DataConfig
from iv3jax.data.feed import Fed
from iv3jax.data.mixture import Mixture
from iv3jax.data.packing import Item, Limits, Row, RowPacker
from iv3jax.data.processor import Processor
from iv3jax.data.quarantine import Dropped, Quarantine
from iv3jax.data.read import LOG, Reader, Reading, configured
from iv3jax.data.sources import open_sources
from iv3jax.errors import UserError
from iv3jax.models.config import ModelConfig
from iv3jax.paths import PathArgument

_MOST_DROPPED = 1000
"""So many samples of one lane, one after the other, that can't be used, are no bad luck."""


@dataclass(frozen=True)
class Counters:
    """What a feed did since it was opened, up to the batch it gave last, on this host.

    Attributes:
        samples: in the batches.
        tokens: of these samples. room: of the rows, padding included.
        dropped: kind (`quarantine.Dropped`) → how many samples.
    """

    samples: int = 0
    tokens: int = 0
    room: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def efficiency(self) -> float:
        """Share of the rows that is not padding."""
        return self.tokens / max(self.room, 1)


class Lane:
    """Fills one row after the other.

    Args:
        number, lanes: r and R.
        state: (1 + look_ahead,) int64 or None: the number, in the lane, of the first sample that was not
            taken yet, then of those that wait, −1 where none does.
        reader: where its samples come from.
        ahead: how many samples it has read ahead of its use.
    """

    def __init__(
        self,
        number: int,
        lanes: int,
        state: np.ndarray | None,
        reader: Reader,
        limits: Limits,
        look_ahead: int,
        ahead: int,
    ):
        first, *waiting = (0,) if state is None else state.tolist()
        self._number, self._lanes, self._look_ahead = number, lanes, look_ahead
        self._reader, self._limits, self._ahead = reader, limits, ahead
        # Those that wait are offered first, in their order: the packer then does what it did before the stop.
        self._keys: Iterator[int] = chain((key for key in waiting if key >= 0), count(first))
        self._packer = RowPacker(limits, look_ahead)
        self._readings: deque[tuple[int, Reading]] = deque()
        self._dropped = 0
        self.drops: list[Dropped] = []

    def step(self) -> Row | None:
        """Takes one sample, waiting for it; returns the row that is finished with it, if one is.

        What was dropped is appended to `drops`.

        Raises:
            UserError: nearly nothing in the sources can be used.
        """
        while len(self._readings) <= self._ahead:
            key = next(self._keys)
            self._readings.append((key, self._reader.start(self._number + key * self._lanes)))
        key, reading = self._readings.popleft()
        found = reading.result()
        if not isinstance(found, Dropped):
            refusal = self._limits.refusal(found)
            if refusal is None:
                self._dropped = 0
                return self._packer.offer(Item(key, reading.name, found))
            found = Dropped(reading.name, "too large", refusal)
            LOG.warning("%s: dropped, %s: %s", found.name, found.kind, found.reason)
        self.drops.append(found)
        self._dropped += 1
        if self._dropped >= _MOST_DROPPED:
            raise UserError(
                f"data: {_MOST_DROPPED} samples one after the other cannot be used; the last, {found.name}: "
                f"{found.reason}"
            )
        return None

    def state_after(self, row: Row) -> np.ndarray:
        """The state that a lane goes on from after this row, its latest."""
        padding = [-1] * (self._look_ahead - len(row.waiting))
        return np.array([row.next, *row.waiting, *padding], np.int64)


class LaneFeed:
    """The `feed.Feed` of this host's lanes. A thread fills the rows, about two batches ahead.

    Attributes:
        counters: up to the batch that was given last.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        reader: Reader,
        limits: Limits,
        config: ModelConfig,
        feature_dtype: np.dtype | None,
    ):
        self._lanes, self._reader, self._limits, self._config = lanes, reader, limits, config
        self._feature_dtype = feature_dtype
        self.counters = Counters()
        # One waits here and one in the thread's hands.
        self._batches: queue.Queue[tuple[Fed, Counters] | BaseException] = queue.Queue(1)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="iv3-data-rows", daemon=True)
        self._thread.start()

    def __iter__(self) -> "LaneFeed":
        return self

    def __next__(self) -> Fed:
        """The next batch.

        Raises:
            UserError: nearly nothing in the sources can be used, or the workers do not start.
        """
        if self._closed.is_set():
            raise ValueError("the feed is closed")
        start = time.perf_counter()
        found = self._batches.get()
        if isinstance(found, BaseException):
            self.close()
            raise found
        fed, self.counters = found
        return fed._replace(waited=time.perf_counter() - start)

    def close(self) -> None:
        """Ends its threads and processes, and saves the quarantine file."""
        if not self._closed.is_set():
            self._closed.set()
            self._reader.close()
            self._thread.join()
            self._reader.save()

    def _run(self) -> None:
        try:
            counters = Counters()
            while not self._closed.is_set():
                fed, counters = self._make(counters)
                self._put((fed, counters))
        # Not ours to judge: it is raised again where the next batch is asked for.
        except BaseException as error:
            self._put(error)

    def _put(self, item: tuple[Fed, Counters] | BaseException) -> None:
        while not self._closed.is_set():
            try:
                return self._batches.put(item, timeout=0.2)
            except queue.Full:
                continue

    def _make(self, before: Counters) -> tuple[Fed, Counters]:
        """One batch, and the counters with it."""
        rows: list[Row | None] = [None] * len(self._lanes)
        # In turns, so that while one lane waits for a sample those of the others are read.
        while None in rows:
            for i, lane in enumerate(self._lanes):
                rows[i] = rows[i] or lane.step()
        done = [row for row in rows if row is not None]
        limits = self._limits
        batch = collate(
            [[item.sample for item in row.items] for row in done],
            self._config,
            length=limits.length,
            chunks=limits.chunks,
            chunk_patches=limits.chunk_patches,
            features=None if self._feature_dtype is None else limits.length,
            feature_dtype=self._feature_dtype,
        )
        names = tuple(tuple(item.name for item in row.items) for row in done)
        pairs = zip(self._lanes, done, strict=True)
        state = np.stack([lane.state_after(row) for lane, row in pairs])
        return Fed(batch, names, state), self._count(before, done)

    def _count(self, before: Counters, rows: Sequence[Row]) -> Counters:
        dropped = dict(before.dropped)
        for lane in self._lanes:
            for drop in lane.drops:
                dropped[drop.kind] = dropped.get(drop.kind, 0) + 1
            lane.drops.clear()
        return Counters(
            before.samples + sum(len(row.items) for row in rows),
            before.tokens + sum(len(item.sample) for row in rows for item in row.items),
            before.room + len(rows) * self._limits.length,
            dropped,
        )


def open_feed(
    config: DataConfig,
    processor: Processor,
    model_config: ModelConfig,
    *,
    rows: int,
    host: int,
    hosts: int,
    length: int,
    chunks: int,
    chunk_patches: int,
    seed: int,
    quarantine: PathArgument | None = None,
    state: np.ndarray | None = None,
) -> LaneFeed:
    """Opens the batches of a config, from the start or from where a state says.

    Host h of n has the lanes h·R/n … (h+1)·R/n − 1. With another number of hosts, put all hosts' states
    together, in order, and split them anew: the global batches go on the same.

    Args:
        config: sources, limits on media, look-ahead, workers.
        processor: the model's; sampling, pixels and numbering are the config's.
        model_config: the model's.
        rows: R, rows of the global batch, all accumulation steps together.
        host, hosts: h and n.
        length, chunks, chunk_patches: see `packing.Limits`.
        seed: of the order.
        quarantine: file of samples that failed (quarantine.py); each feed must have its own.
        state: (R/n, 1 + look_ahead), `Fed.state` of the batch before the next.

    Raises:
        UserError: a setting that makes no sense, `open_sources`'s errors, or a state of other lanes.
    """
    check_config(config, model_config, chunk_patches)
    if not 0 <= host < hosts or rows % hosts:
        raise UserError(f"rows: {rows} rows of the global batch cannot be shared by {hosts} hosts")
    shape = (rows // hosts, 1 + config.look_ahead)
    if state is not None and state.shape != shape:
        raise UserError(
            f"the data's state is of {state.shape[0]} lanes with a look-ahead of {state.shape[1] - 1}, but "
            f"this run has {shape[0]} and {config.look_ahead}; set rows, accumulate and data.look_ahead as "
            "they were"
        )
    opened = open_sources(config)
    order = Mixture([len(one.source) for one in opened], [one.weight for one in opened], seed)
    limits = Limits(length, chunks, chunk_patches)
    reader = Reader(
        [one.source for one in opened],
        order,
        configured(processor, config),
        config,
        Quarantine(quarantine, host, hosts),
    )
    ahead = ceil(2 * max(config.workers, 1) / shape[0])
    lanes = [
        Lane(
            host * shape[0] + i,
            rows,
            None if state is None else state[i],
            reader,
            limits,
            config.look_ahead,
            ahead,
        )
        for i in range(shape[0])
    ]
    stored = None if processor.features is None else np.dtype(processor.features.spec.dtype)
    return LaneFeed(lanes, reader, limits, model_config, stored)


def check_config(config: DataConfig, model_config: ModelConfig, chunk_patches: int) -> None:
    """Refuses what makes no sense.

    Raises:
        UserError: it names the field.
    """
    for name, least in (("workers", 0), ("look_ahead", 0)):
        if getattr(config, name) < least:
            raise UserError(f"data.{name}: {getattr(config, name)} must be at least {least}")
    if not config.timeout > 0:
        raise UserError(f"data.timeout: {config.timeout} must be a positive number of seconds")
    vision = model_config.vision_config
    if vision is not None and chunk_patches % vision.spatial_merge_size**2:
        tokens = vision.spatial_merge_size**2
        raise UserError(f"chunk_patches: {chunk_patches} must be a multiple of {tokens}, one vision token")
