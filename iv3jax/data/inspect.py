"""What a data config would feed: samples by source, what is dropped and why, how full rows are, a sample."""

import dataclasses
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from iv3jax.data.chunks import Chunks
from iv3jax.data.config import DataConfig
from iv3jax.data.lanes import check_config
from iv3jax.data.mixture import Mixture
from iv3jax.data.packing import Item, Limits, RowPacker
from iv3jax.data.processor import Processor
from iv3jax.data.quarantine import Dropped, Quarantine
from iv3jax.data.read import Reader, configured
from iv3jax.data.sample import Sample
from iv3jax.data.sources import open_sources
from iv3jax.models.batch import IGNORE_LABEL

_AHEAD = 16
_MOST_NAMED = 20


@dataclass(frozen=True)
class SourceReport:
    """One source, and its part of the samples that were looked at.

    Attributes:
        name: its own. records: all it has. share: of the mixture.
        drawn: samples looked at; used: those of them that were not dropped.
        tokens, vision_tokens, trained_tokens, frames: of those used, together; vision tokens and trained ones
            are among the tokens.
        longest: tokens of the longest.
    """

    name: str
    records: int
    share: float
    drawn: int
    used: int
    tokens: int
    vision_tokens: int
    trained_tokens: int
    frames: int
    longest: int


@dataclass(frozen=True)
class Report:
    """What `inspect` found.

    Attributes:
        sources: in the config's order.
        dropped: kind → how many. named: the first of them.
        rows: that were filled. samples_per_row: on average.
        efficiency: share of the tokens of these rows that is not padding.
        chunks_used: share of their vision chunks that hold something; 0 for rows without chunks.
        sample: the first sample, as text, vision runs shortened and what is trained on marked.
    """

    sources: tuple[SourceReport, ...]
    dropped: dict[str, int]
    named: tuple[Dropped, ...]
    rows: int
    samples_per_row: float
    efficiency: float
    chunks_used: float
    sample: str

    def to_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    def as_text(self) -> str:
        """The same for people."""
        head = (
            "source",
            "records",
            "share",
            "drawn",
            "used",
            "tokens",
            "vision",
            "trained",
            "frames",
            "longest",
        )
        table = [head]
        for one in self.sources:
            name, records, share, *counts = dataclasses.astuple(one)
            table.append((name, str(records), f"{share:.1%}", *map(str, counts)))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in table
        ]
        kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(self.dropped.items()))
        lines += ["", f"dropped: {kinds or 'none'}"]
        lines += [f"  {drop.name}: {drop.kind}: {drop.reason}" for drop in self.named]
        lines += [
            "",
            f"packing: {self.rows} rows, {self.samples_per_row:.1f} samples a row, {self.efficiency:.1%} of "
            f"the tokens and {self.chunks_used:.1%} of the vision chunks used",
            "",
            "one sample, ⟦trained on⟧:",
            self.sample,
        ]
        return "\n".join(lines)


def inspect(
    config: DataConfig,
    processor: Processor,
    *,
    length: int,
    chunks: int,
    chunk_patches: int,
    seed: int,
    samples: int = 64,
) -> Report:
    """Reads the first samples of a config's global order and packs them as one lane would.

    Args:
        config: see `lanes.open_feed`, also for the other arguments.
        samples: how many to look at, at least 1. No quarantine file is read or written.

    Raises:
        UserError: a setting that makes no sense, or a source that cannot be opened.
    """
    check_config(config, processor.config, chunk_patches)
    limits = Limits(length, chunks, chunk_patches)
    opened = open_sources(config)
    order = Mixture([len(one.source) for one in opened], [one.weight for one in opened], seed)
    reader = Reader(
        [one.source for one in opened], order, configured(processor, config), config, Quarantine(None)
    )
    tallies = [_Tally() for _ in opened]
    items: list[Item] = []
    drops: list[Dropped] = []
    shown = "none could be used"
    readings = deque(reader.start(i) for i in range(min(_AHEAD, samples)))
    try:
        for i in range(samples):
            reading = readings.popleft()
            if i + _AHEAD < samples:
                readings.append(reader.start(i + _AHEAD))
            found = reading.result()
            tally = tallies[reading.source]
            tally.drawn += 1
            if isinstance(found, Sample) and (refusal := limits.refusal(found)) is not None:
                found = Dropped(reading.name, "too large", refusal)
            if isinstance(found, Dropped):
                drops.append(found)
                continue
            if not items:
                shown = f"{reading.name}\n{render_mask(found, processor)}"
            tally.add(found, processor)
            items.append(Item(i, reading.name, _without_pixels(found)))
    finally:
        reader.close()
    rows = _rows(items, limits, config.look_ahead)
    room = max(len(rows), 1)
    weights = sum(one.weight for one in opened)
    return Report(
        tuple(
            SourceReport(one.name, len(one.source), one.weight / weights, **vars(tally))
            for one, tally in zip(opened, tallies, strict=True)
        ),
        dict(Counter(drop.kind for drop in drops)),
        tuple(drops[:_MOST_NAMED]),
        len(rows),
        sum(map(len, rows)) / room,
        sum(len(item.sample) for row in rows for item in row) / (room * length),
        sum(_chunks(row, chunk_patches) for row in rows) / (room * chunks) if chunks else 0.0,
        shown,
    )


def render_mask(sample: Sample, processor: Processor) -> str:
    """A sample's tokens as text: ⟦what is trained on⟧, and runs of vision tokens as `<|video_pad|>×N`."""
    ids = sample.input_ids
    # A label says what the next token is.
    trained = np.concatenate([[False], sample.labels[:-1] != IGNORE_LABEL])
    pads = (processor.config.image_token_id, processor.config.video_token_id)
    shape = 2 * np.where(np.isin(ids, pads), ids.astype(np.int64) + 1, 0) + trained
    text = []
    for run in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(shape)) + 1):
        if ids[run[0]] in pads:
            text.append(f"{processor.tokenizer.decode(ids[run[:1]], skip_special=False)}×{len(run)}")
        else:
            words = processor.tokenizer.decode(ids[run], skip_special=False)
            text.append(f"⟦{words}⟧" if trained[run[0]] else words)
    return "".join(text)


@dataclass
class _Tally:
    """The counts of a SourceReport, while they grow."""

    drawn: int = 0
    used: int = 0
    tokens: int = 0
    vision_tokens: int = 0
    trained_tokens: int = 0
    frames: int = 0
    longest: int = 0

    def add(self, sample: Sample, processor: Processor) -> None:
        """Counts one sample."""
        config = processor.config
        self.used += 1
        self.tokens += len(sample)
        self.vision_tokens += int(
            np.isin(sample.input_ids, (config.image_token_id, config.video_token_id)).sum()
        )
        self.trained_tokens += int((sample.labels != IGNORE_LABEL).sum())
        self.frames += sum(media.frames for media in sample.media)
        self.longest = max(self.longest, len(sample))


def _without_pixels(sample: Sample) -> Sample:
    """What packing asks of a sample: the pixels or features of a long video fill gigabytes."""
    features = tuple(None if one is None else one[:0].copy() for one in sample.features)
    return replace(sample, patches=sample.patches[:0].copy(), features=features)


def _rows(items: Sequence[Item], limits: Limits, look_ahead: int) -> list[tuple[Item, ...]]:
    """The rows that a lane fills from these; if they don't fill one, all that fits into one."""
    packer = RowPacker(limits, look_ahead)
    rows = [row.items for item in items if (row := packer.offer(item)) is not None]
    return rows or [packer.items]


def _chunks(row: Sequence[Item], width: int) -> int:
    """How many vision chunks a row needs."""
    chunks = Chunks(width)
    for item in row:
        chunks.place(item.sample.temporal_patches)
    return len(chunks)
