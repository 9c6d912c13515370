"""The conversion bench's own parts on a tiny random model: shared steps, cut ranks, distillation, tables."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from models.peers import even_config, random_tensors, write_folder

from iv3jax.bench import conversion_text as text
from iv3jax.bench import conversion_video as video
from iv3jax.bench.cells import Cells
from iv3jax.bench.conversion import bench_conversion, format_table
from iv3jax.bench.conversion_distill import distilled
from iv3jax.bench.conversion_lab import Lab, load_source, make, model_of, rope_step
from iv3jax.bench.conversion_row import main as measure_row
from iv3jax.bench.perplexity import log_perplexity
from iv3jax.bench.transmla_code import main as measure_transmla
from iv3jax.checkpoint.load import load
from iv3jax.conversion.calibration import from_samples, text_sample
from iv3jax.conversion.config import ConvertConfig, plan
from iv3jax.conversion.convert import convert
from iv3jax.conversion.source import Source
from iv3jax.errors import UserError
from iv3jax.models.config import ModelConfig
from iv3jax.models.presets import preset

pytestmark = pytest.mark.medium

GQA = even_config("gqa", hidden_size=96, mrope_section=None, use_qk_norm=False, num_hidden_layers=2)
CONFIG = ModelConfig("llama", GQA.text_config)
IDS = np.random.default_rng(5).integers(0, 90, (16, 32)).astype(np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model") / "source", CONFIG, random_tensors(CONFIG))


def lab_of(folder: Path, place: Path) -> Lab:
    source = Source.open(folder)
    rows = list(map(text_sample, IDS))
    return Lab(source, from_samples(rows, source.config, length=32, rows=4), place)


@pytest.mark.parametrize("method", ["transmla", "care", "iv3"])
def test_what_is_made_is_what_convert_writes(folder: Path, tmp_path: Path, method: str, monkeypatch):
    # The bench holds nothing out.
    monkeypatch.setattr("iv3jax.conversion.convert.held_out", lambda batches: ())
    lab = lab_of(folder, tmp_path / "lab")
    e = CONFIG.text_config.head_dim
    fold = None if method == "iv3" else 1
    config = ConvertConfig(rank=12, method=method, rope_dim=e, freqfold=fold, tokens=512, length=32)
    convert(folder, tmp_path / "written", config, lab.calibration)
    wanted = log_perplexity(load(tmp_path / "written"), IDS)
    with lab.prepared(method, e, fold) as run:
        made = make(run, 12)
    assert made.ranks == (12, 12)
    np.testing.assert_allclose(log_perplexity(model_of(made, load_source(folder)), IDS), wanted, rtol=1e-5)


def test_steps_are_shared_and_only_ours_are_fitted_to_logits(folder: Path, tmp_path: Path):
    lab, e = lab_of(folder, tmp_path), CONFIG.text_config.head_dim
    found = {}
    for method in ("transmla", "care", "iv3"):
        with lab.prepared(method, e, 1) as run:
            assert (run.work.folder / "source_1").is_symlink()
            assert (run.work.folder / "split_0").is_symlink() == (method == "care")
            found[method] = rope_step(run)
    source = load_source(folder)
    losses = {m: log_perplexity(model_of(made, source), IDS) for m, made in found.items()}
    assert losses["transmla"] == losses["care"] != losses["iv3"]


@pytest.mark.parametrize("method", ["transmla", "iv3"])
def test_distillation_brings_the_model_nearer_to_the_source(folder: Path, tmp_path: Path, method: str):
    lab, source = lab_of(folder, tmp_path), load_source(folder)
    with lab.prepared(method, CONFIG.text_config.head_dim, 1) as run:
        converted = model_of(make(run, 8), source)
    trained, missed = distilled(converted, source, lab.calibration.batches * 6, rate=3e-3)
    assert np.mean(missed[-4:]) < 0.9 * np.mean(missed[:4])
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), trained.params, converted.params)
    for path, one in jax.tree_util.tree_leaves_with_path(changed):
        assert one == ("self_attn" in jax.tree_util.keystr(path))


def test_distillation_begins_at_the_divergence_itself(folder: Path, tmp_path: Path):
    lab, source = lab_of(folder, tmp_path), load_source(folder)
    with lab.prepared("transmla", CONFIG.text_config.head_dim, 1) as run:
        converted = model_of(make(run, 8), source)
    batch = lab.calibration.batches[0]
    logprobs = []
    for one in (source, converted):
        hidden = one.model.apply({"params": one.params}, batch).hidden
        logits = one.model.apply({"params": one.params}, hidden, method="logits")
        logprobs.append(np.asarray(jax.nn.log_softmax(logits), np.float64))
    wanted = (np.exp(logprobs[0]) * (logprobs[0] - logprobs[1])).sum(axis=-1).mean()
    assert (np.asarray(batch.segment_ids) != 0).all()
    _, missed = distilled(converted, source, [batch], rate=0.0)
    np.testing.assert_allclose(missed, [wanted], rtol=1e-4)


def test_lines_of_the_table():
    layouts = {(m, s): (64, 2) for m in text.METHODS for s in text.SIZES}
    found = text.points(layouts)
    assert len({replace(p, row="") for p in found}) == len(found) == 4 * 5 + 2 * 2
    rows = [
        {**vars(p), "excess": {"a": 0.5 if p.method == "iv3" else 1.0}, "standard_error": {"a": 0.01}}
        for p in found
    ]
    made = text.with_ratios(rows)
    assert all(r["ratio"]["a"] == (0.5 if r["method"] == "iv3" else 1.0) for r in made)
    result = dict(source={"a": 3.6}, calibration_tokens=512, rows=made)
    shown = text.format_table(
        result | {"distillation": dict(steps=60, tokens=600, learning_rate={"iv3": 1e-3})}
    )
    assert "iv3, ranks by layer" in shown and "0.500 ±0.010" in shown


def test_excess_is_paired():
    source = np.array([1.0, 5.0, 9.0])
    mean, error = text.excess(source + np.array([0.1, 0.2, 0.3]), source)
    assert mean == pytest.approx(0.2) and error == pytest.approx(0.1 / 3**0.5)


def test_finished_cells_are_not_measured_again(tmp_path: Path):
    def never() -> None:
        raise AssertionError

    assert Cells(tmp_path)("a", lambda: [1.5]) == [1.5]
    assert Cells(tmp_path)("a", never) == [1.5]


def test_video_conversions_fill_the_cache_that_they_name():
    source = preset("tiny_gqa")
    for name, config in video.variants().items():
        found = plan(config, source)
        extra = 4 if config.qk_norm == "cached" else 0
        assert f"{(found.rank + found.rope_dim + extra) / 128:.1%} " == f"{name.split()[0]} "


def test_parts_and_their_tables():
    row = dict(answer_kl=0.1, answer_top1=0.9, text_kl=0.2, text_top1=0.8, same_answers=0.5)
    row |= dict(name="source", bytes_per_token=768, answer_loss=0.25, scores=dict(a=1.0, b=1.0, c=0.5, d=0.5))
    shown = format_table({"video": dict(videos=4, recovery=["steps=2"], rows=[row])})
    assert "source" in shown and "0.250" in shown and "steps=2" in shown
    with pytest.raises(UserError, match="there are text, video"):
        bench_conversion("sound")


def test_a_folder_that_is_no_clone_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure_transmla([str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "partial_rope.py: not there" in said and said.count("\n") == 1
    assert measure_transmla([]) == 2


@pytest.fixture
def books(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of 300 000 tokens, which are their own places; "devref" has a tenth of them."""
    monkeypatch.setattr(
        text, "read_text", lambda name, packages: "x" * (30_000 if name == "devref" else 300_000)
    )
    monkeypatch.setattr(
        text, "windows", lambda whole, tokenizer, n: np.arange(len(whole) // n * n).reshape(-1, n)
    )


def test_no_tested_page_is_calibrated_on(books: None):
    known, rest = text.calibration_windows("persuasion", Path(), Path())
    pages = text.windows("x" * 300_000, Path(), text.TEST_WINDOW)
    tested = text.spaced(pages, text.TEXTS["persuasion"])
    assert known.shape == (text.CALIBRATION, text.WINDOW)
    together = np.concatenate([known.ravel(), rest.ravel(), tested.ravel()])
    assert np.array_equal(np.sort(together), pages.ravel())


def test_the_handbooks_first_windows_are_calibrated_on(books: None):
    known, rest = text.calibration_windows("calibration", Path(), Path())
    assert np.array_equal(known.ravel(), np.arange(text.CALIBRATION * text.WINDOW))
    assert rest[0, 0] == known.size


def test_texts_have_equal_shares_and_take_turns(books: None, monkeypatch):
    monkeypatch.setattr(text, "own_text", lambda packages: "x" * 40_000)
    whole, rest = text.calibration_windows("calibration", Path(), Path())
    own, _ = text.calibration_windows("own", Path(), Path())
    known, judged = text.mixed_windows(["calibration", "own"], Path(), Path())
    half = text.CALIBRATION // 2
    assert known.shape == (2 * half, text.WINDOW)
    assert np.array_equal(known[::2], text.spaced(whole, half))
    assert np.array_equal(known[1::2], text.spaced(own, half))
    assert np.array_equal(judged, rest)
    assert np.array_equal(text.mixed_windows(["calibration"], Path(), Path())[0], whole)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("transmla --rope-dim 32 --rank 88", "--freqfold is needed for transmla"),
        ("care --rope-dim 32 --freqfold 4 --rank 88 --distilled", "not care"),
        ("iv3 --rope-dim 32 --rank 88 --distilled --steps 17", "--steps 17: from 1 to 16"),
        ("iv3 --rope-dim 32 --rank 88 --steps 4", "--steps 4: from 1 to 16, beside --distilled"),
        (
            "iv3 --rope-dim 32 --rank 88 --calibrated-on devref",
            "'devref': 84 windows are not tested, 136 are",
        ),
    ],
)
def test_a_row_that_cannot_be_is_refused(arguments: str, says: str, books: None, monkeypatch, capsys):
    monkeypatch.setattr(text, "smollm2_folder", lambda packages: Path())
    monkeypatch.setattr(text, "Source", type("Unread", (), {"open": lambda place: None}))
    assert measure_row(arguments.split()) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and says in said and said.count("\n") == 1
