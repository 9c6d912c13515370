"""`inspect` counts what a feed would give, checked against the samples themselves."""

import json

import pytest
from feeding import CHUNK_PATCHES, CHUNKS, CONFIG, LENGTH, PROCESSOR, config_of, line, source, write_corpus

from iv3jax.data.inspect import inspect, render_mask
from iv3jax.data.read import Read, configured
from iv3jax.data.sources import open_sources
from iv3jax.errors import UserError

LIMITS = {"length": LENGTH, "chunks": CHUNKS, "chunk_patches": CHUNK_PATCHES, "seed": 3}


@pytest.fixture
def config(tmp_path):
    lines = [line(0, "Fine."), line(1, "Gone", ("video", "gone.mp4")), line(2, "Too long. " * 100)]
    path = tmp_path / "other.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return config_of(source(write_corpus(tmp_path)), source(path))


def test_one_epoch_is_counted(config):
    opened = open_sources(config)
    read = Read([one.source for one in opened], configured(PROCESSOR, config))
    report = inspect(config, PROCESSOR, **LIMITS, samples=17)
    corpus, other = report.sources
    samples = [read((0, i)) for i in range(14)]
    pads = (CONFIG.image_token_id, CONFIG.video_token_id)
    assert (corpus.name, corpus.records, corpus.drawn, corpus.used) == ("corpus.jsonl", 14, 14, 14)
    assert corpus.share == pytest.approx(14 / 17)
    assert corpus.tokens == sum(len(s) for s in samples)
    assert corpus.longest == max(len(s) for s in samples)
    assert corpus.frames == sum(m.frames for s in samples for m in s.media)
    assert corpus.vision_tokens == sum(int(sum(s.input_ids == pad).sum()) for s in samples for pad in pads)
    assert corpus.trained_tokens == sum(int((s.labels >= 0).sum()) for s in samples)
    assert (other.records, other.drawn, other.used) == (3, 3, 1)
    assert report.dropped == {"unreadable": 1, "too large": 1}
    assert {drop.name for drop in report.named} == {"other.jsonl:2", "other.jsonl:3"}
    assert report.rows >= 2 and report.samples_per_row > 1
    assert 0.4 < report.efficiency <= 1 and 0 < report.chunks_used <= 1


def test_text_and_json(config):
    report = inspect(config, PROCESSOR, **LIMITS, samples=17)
    text = report.as_text()
    for part in ("corpus.jsonl", "dropped: 1 too large, 1 unreadable", "gone.mp4: no such file", "packing: "):
        assert part in text
    assert json.loads(json.dumps(report.to_dict()))["sources"][0]["used"] == 14


def test_fewer_samples_than_fill_a_row(config):
    report = inspect(config, PROCESSOR, **LIMITS, samples=1)
    assert report.rows == 1 and sum(one.drawn for one in report.sources) == 1


def test_the_mask_is_shown():
    messages = [
        {"role": "user", "content": "Which?"},
        {"role": "assistant", "content": "That."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
    ]
    assert render_mask(PROCESSOR(messages), PROCESSOR) == (
        "<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant\n⟦That.<|im_end|>⟧\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n⟦So.<|im_end|>⟧\n"
    )


def test_vision_runs_are_shortened(config):
    record = open_sources(config)[0].source[1]
    text = render_mask(configured(PROCESSOR, config)(record.messages), PROCESSOR)
    start, pad, end = "<|vision_start|>", "<|video_pad|>", "<|vision_end|>"
    assert f"Video 1: <0.1 seconds>{start}{pad}×2{end}<0.2 seconds>{start}" in text
    assert text.count(pad) == 3


def test_a_setting_that_makes_no_sense(config):
    with pytest.raises(UserError, match="chunk_patches: 6"):
        inspect(config, PROCESSOR, **LIMITS | {"chunk_patches": 6})
