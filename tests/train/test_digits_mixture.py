"""The mixture that the demo trains on: it fits its rows, repeats no question, and sees no test pixel."""

from itertools import islice

import numpy as np
import pytest

from iv3jax.data import digits
from iv3jax.data.processor import Processor
from iv3jax.data.tokenizer import TINY_FOLDER
from iv3jax.models.batch import IGNORE_LABEL
from iv3jax.models.presets import preset
from iv3jax.train.config import experiment
from iv3jax.train.digits import samples

CONFIG = experiment("digits")
PROCESSOR = Processor.from_dir(TINY_FOLDER, preset("tiny"))


@pytest.fixture(autouse=True)
def only_training_pixels(monkeypatch: pytest.MonkeyPatch):
    """Fails when a test clip or a test digit is opened."""
    images, background = digits.digit_images, digits.background

    def checked_images(split: str):
        assert split == "train"
        return images(split)

    def checked_background(clip: str):
        assert clip in digits.CLIPS["train"]
        return background(clip)

    monkeypatch.setattr(digits, "digit_images", checked_images)
    monkeypatch.setattr(digits, "background", checked_background)


@pytest.mark.parametrize("progress", [0.0, 0.2, 1.0])
def test_every_sample_fits_a_row_and_is_trained_on(progress: float):
    stream = samples(np.random.default_rng(1), PROCESSOR, CONFIG.digits, progress)
    for sample in islice(stream, 1500):
        assert len(sample) <= CONFIG.length
        assert sum(t for t, _, _ in sample.grids) <= CONFIG.chunks
        assert np.sum(sample.labels != IGNORE_LABEL) >= 3


def test_no_question_stands_twice_in_a_conversation():
    stream = samples(np.random.default_rng(1), PROCESSOR, CONFIG.digits, 1.0)
    for sample in islice(stream, 200):
        turns = PROCESSOR.tokenizer.decode(sample.input_ids, skip_special=False).split("<|im_start|>")
        questions = [turn for turn in turns if turn.startswith("user") and "seconds>" not in turn]
        assert len(set(questions)) == len(questions)


def test_reading_comes_first():
    early = islice(samples(np.random.default_rng(1), PROCESSOR, CONFIG.digits, 0.0), 200)
    assert all(sum(t for t, _, _ in sample.grids) <= 4 for sample in early)
