"""Feeds: a resume is exact, hosts and workers change nothing, each record is used once an epoch."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from feeding import (
    CHUNKS,
    CONFIG,
    LENGTH,
    PROCESSOR,
    ROWS,
    assert_same,
    config_of,
    feed,
    joined,
    line,
    source,
    take,
    write_corpus,
)

from iv3jax.data import workers
from iv3jax.data.clips import StoreSpec, identify
from iv3jax.data.config import DataConfig, SourceConfig
from iv3jax.data.features import FeatureStore, FeatureWriter
from iv3jax.data.lanes import LaneFeed
from iv3jax.data.mixture import Mixture
from iv3jax.data.read import Reader, Reading, configured
from iv3jax.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("corpus")


@pytest.fixture(scope="module")
def corpus(folder) -> SourceConfig:
    return source(write_corpus(folder))


@pytest.fixture(scope="module")
def config(corpus, folder) -> DataConfig:
    """Two sources, one of them with a line that cannot be read and one that fits no row."""
    lines = [line(i, "More text. " * (1 + i)) for i in range(4)]
    lines += [line(4, "Gone", ("video", "gone.mp4")), line(5, "Too long. " * 100)]
    path = folder / "other.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return config_of(corpus, source(path, weight=5.0))


@pytest.fixture(scope="module")
def batches(config):
    return take(config, 7)


def test_shapes_and_names(batches):
    for fed in batches:
        assert fed.batch.input_ids.shape == (ROWS, LENGTH)
        assert fed.batch.patches.shape[:2] == (ROWS, CHUNKS)
        segments = fed.batch.segment_ids.max(1)
        assert segments.tolist() == [len(names) for names in fed.names]
        assert fed.state.shape == (ROWS, 3) and fed.state.dtype == np.int64
        assert fed.waited >= 0
    names = {name for fed in batches for row in fed.names for name in row}
    assert "corpus.jsonl:1" in names and "other.jsonl:2" in names
    assert not names & {"other.jsonl:5", "other.jsonl:6"}
    assert len({fed.batch.input_ids.tobytes() for fed in batches}) == len(batches)


@pytest.mark.parametrize("done", [1, 2, 5])
def test_a_resume_gives_the_next_batches(config, batches, done):
    assert_same(take(config, 7 - done, state=batches[done - 1].state), batches[done:])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_same_global_batches(config, batches, hosts):
    got = [take(config, 3, host=host, hosts=hosts) for host in range(hosts)]
    assert_same(joined(got), batches[:3])


def test_a_resume_on_other_hosts_goes_on_the_same(config, batches):
    two = joined([take(config, 2, host=host, hosts=2) for host in range(2)])
    four = [
        take(config, 2, host=host, hosts=4, state=part)
        for host, part in enumerate(np.split(two[-1].state, 4))
    ]
    whole = joined(four)
    assert_same(whole, batches[2:4])
    assert_same(take(config, 1, state=whole[-1].state), batches[4:5])


@pytest.mark.medium
def test_workers_change_nothing(config, batches):
    config = config_of(*config.sources, workers=2)
    assert_same(take(config, 4), batches[:4])
    assert_same(take(config, 2, state=batches[3].state), batches[4:6])


@pytest.mark.medium
def test_killed_workers_change_nothing(config, batches):
    got = []
    with feed(config_of(*config.sources, workers=2)) as opened:
        for _ in range(5):
            got.append(next(opened))
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    assert_same(got, batches[:5])
    assert not multiprocessing.active_children()


@pytest.mark.medium
def test_a_hanging_video_is_killed_and_named(config, corpus, tmp_path):
    """Opening a named pipe that nobody writes to waits for ever, as a dead file server does."""
    os.mkfifo(tmp_path / "hangs.mp4")
    lines = [line(0, "Wait.", ("video", "hangs.mp4")), line(1, "Text.")]
    (tmp_path / "slow.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = config_of(corpus, source(tmp_path / "slow.jsonl", weight=3.0), workers=2, timeout=2.0)
    path = tmp_path / "quarantine.jsonl"
    with feed(config, quarantine=path) as opened:
        got = [next(opened) for _ in range(4)]
        assert opened.counters.dropped["timeout"] >= 1
    [entry] = [json.loads(text) for text in path.read_text().splitlines()]
    assert (entry["name"], entry["kind"], entry["reason"]) == (
        "slow.jsonl:1",
        "timeout",
        "not read after 2 seconds",
    )
    # A later run makes the same batches without waiting for it: in a thread it would hang for ever.
    assert_same(take(replace(config, workers=0), 4, quarantine=path), got)


@pytest.mark.parametrize("look_ahead", [0, 3])
def test_each_record_once_an_epoch(corpus, look_ahead):
    """Of 14 good records, in as many epochs as ten batches hold."""
    config = config_of(corpus, look_ahead=look_ahead)
    taken = take(config, 10)
    order = Mixture([14], [14.0], 7)
    epochs: list[Counter] = [Counter() for _ in range(50)]
    for r in range(ROWS):
        state = taken[-1].state[r].tolist()
        waiting = {key for key in state[1:] if key >= 0}
        # A lane's samples up to its state, but for those that wait, are exactly those in its rows.
        used = [r + ROWS * key for key in range(state[0]) if key not in waiting]
        names = Counter(name for fed in taken for name in fed.names[r])
        assert names == Counter(f"corpus.jsonl:{1 + order[i][1]}" for i in used)
        for i in used:
            epochs[i // 14][order[i][1]] += 1
    # No record twice in an epoch; the first are through, with every record once.
    assert all(count == 1 for epoch in epochs for count in epoch.values())
    assert len(epochs[0]) == 14


def test_counters(config):
    with feed(config) as opened:
        for number in range(1, 6):
            fed = next(opened)
            counters = opened.counters
            assert counters.room == number * ROWS * LENGTH
        assert set(counters.dropped) == {"unreadable", "too large", "quarantined"}
        # It fails once, and is not tried in the next epochs.
        assert counters.dropped["unreadable"] == 1
        assert 0.3 < counters.efficiency <= 1
        assert counters.tokens == round(counters.efficiency * counters.room)
        before = counters.samples - sum(map(len, fed.names))
        assert 0 < before < counters.samples


def test_what_failed_is_named_and_skipped_from_there_on(config, batches, tmp_path):
    path = tmp_path / "quarantine.jsonl"
    first = take(config, 7, quarantine=path)
    assert_same(first, batches)
    [entry] = [json.loads(text) for text in path.read_text().splitlines()]
    assert entry["name"] == "other.jsonl:5" and "gone.mp4: no such file" in entry["reason"]
    assert entry["count"] > 1
    assert_same(take(config, 7, quarantine=path), batches)
    with feed(config, quarantine=path, state=batches[3].state) as opened:
        assert_same([next(opened) for _ in range(3)], batches[4:])
        assert "unreadable" not in opened.counters.dropped


@pytest.mark.medium
def test_videos_from_a_feature_store(corpus, folder, tmp_path):
    """The same tokens in the same rows; features instead of the videos' patches, in every batch alike."""
    vision = CONFIG.vision_config
    config = config_of(corpus, workers=1)
    processor = configured(PROCESSOR, config)
    levels, rng = len(vision.deepstack_visual_indexes), np.random.default_rng(0)
    with FeatureWriter.open(
        tmp_path / "store", StoreSpec("0" * 16, levels, vision.out_hidden_size)
    ) as writer:
        for path in sorted(folder.glob("v*.mp4")):
            content = [{"type": "video", "video": str(path)}]
            sample = processor([{"role": "user", "content": content}])
            tokens = len(sample.patches) // vision.spatial_merge_size**2
            values = rng.standard_normal((tokens, 1 + levels, vision.out_hidden_size))
            pieces = [values.astype(np.dtype("bfloat16"))]
            args = (processor.video_sampling, sample.media[0], sample.grids[0], tokens, pieces)
            writer.add(identify(path), *args)
    # With chunks for all pixels, rows are as full with them as without.
    plain = take(config, 3, chunks=40)
    stored = take(
        config, 3, chunks=40, processor=replace(PROCESSOR, features=FeatureStore(tmp_path / "store"))
    )
    for a, b in zip(plain, stored, strict=True):
        assert a.names == b.names
        np.testing.assert_array_equal(a.batch.input_ids, b.batch.input_ids)
        np.testing.assert_array_equal(a.batch.visual_index >= 0, b.batch.visual_index >= 0)
        assert b.batch.features.shape == (ROWS, LENGTH, 1 + levels, vision.out_hidden_size)
        assert b.batch.features.dtype == np.dtype("bfloat16")
        assert a.batch.patches.shape == b.batch.patches.shape
        assert (b.batch.patch_segment_ids > 0).sum() < (a.batch.patch_segment_ids > 0).sum()


@pytest.mark.medium
def test_it_reads_no_further_ahead_than_it_says(config, monkeypatch):
    started = []

    def start(self: Reader, index: int) -> Reading:
        started.append(index)
        return original(self, index)

    original = Reader.start
    monkeypatch.setattr(Reader, "start", start)
    with feed(config) as opened:
        time.sleep(2.0)
        first = sum(map(len, next(opened).names))
        time.sleep(2.0)
        before = len(started)
        time.sleep(1.0)
        assert len(started) == before
        # Of this batch, the next two and what the lanes hold: each has two that wait, one in a row, two read.
        assert before <= 4 * first + 5 * ROWS


def test_nothing_usable_is_an_error(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("{}\n" * 300)
    with pytest.raises(UserError, match=r"1000 samples .* bad.jsonl:\d+: .*messages is missing"):
        take(config_of(source(path)), 1)


def test_closing_ends_the_threads(config):
    before = threading.active_count()
    with feed(config) as opened:
        next(opened)
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="closed"):
        next(opened)


def test_a_thread_that_fails_tells_the_caller(config, monkeypatch):
    def broken(self: LaneFeed, counters: object) -> None:
        raise workers.WorkersClosedError("as if")

    monkeypatch.setattr(LaneFeed, "_make", broken)
    with pytest.raises(workers.WorkersClosedError, match="as if"):
        take(config, 1)


@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        ({"sources": ()}, {}, r"data\.sources: is empty"),
        ({"workers": -1}, {}, r"data\.workers: -1"),
        ({"look_ahead": -1}, {}, r"data\.look_ahead: -1"),
        ({"timeout": 0.0}, {}, r"data\.timeout: 0"),
        ({}, {"chunk_patches": 6}, "chunk_patches: 6 must be a multiple of 4"),
        ({}, {"rows": 5, "hosts": 2}, "5 rows of the global batch cannot be shared by 2 hosts"),
        ({}, {"state": np.zeros((4, 2), np.int64)}, "4 lanes with a look-ahead of 1, .* has 4 and 2"),
        ({}, {"state": np.zeros((2, 3), np.int64)}, "2 lanes with a look-ahead of 2, .* has 4 and 2"),
    ],
)
def test_settings_that_make_no_sense(config, fields, arguments, message):
    with pytest.raises(UserError, match=message):
        take(replace(config, **fields), 1, **arguments)
