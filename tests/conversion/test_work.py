"""Work: steps are whole or absent, a run goes on where it was killed, and never beside another one."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from iv3jax.conversion.work import Work, save_arrays
from iv3jax.errors import UserError

PRINT = {"source": "abc", "settings": {"rank": 64, "fraction": None}, "ranks": [1, 2]}


def refusal(out: Path, fingerprint: dict = PRINT, **options) -> str:
    with pytest.raises(UserError) as caught, Work.open(out, fingerprint, **options):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_steps_are_kept_and_removed_at_the_end(tmp_path):
    out = tmp_path / "model"
    with Work.open(out, PRINT) as work:
        assert work.folder == tmp_path / "model.converting" and not work.done("layer_00")
        with work.step("layer_00") as folder:
            (folder / "a.txt").write_text("finished")
            assert not work.done("layer_00")
        assert work.done("layer_00")
    # Tuples are JSON's lists: the same conversion.
    with Work.open(out, PRINT | {"ranks": (1, 2)}) as work:
        assert (work.path("layer_00") / "a.txt").read_text() == "finished"
        work.remove()
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_step_leaves_nothing(tmp_path):
    with Work.open(tmp_path / "model", PRINT) as work:
        with pytest.raises(KeyboardInterrupt), work.step("layer_00") as folder:
            (folder / "half.npy").write_bytes(b"half")
            raise KeyboardInterrupt
        assert not work.done("layer_00")
        assert sorted(path.name for path in work.folder.iterdir()) == ["fingerprint.json", "lock"]


_KILLED = """
import sys, time
from iv3jax.conversion.work import Work
with Work.open({out!r}, {{"rank": 64}}) as work:
    with work.step("layer_00") as folder:
        (folder / "a.txt").write_text("finished")
    with work.step("layer_01") as folder:
        (folder / "a.txt").write_text("half")
        print("now", flush=True)
        time.sleep(60)
"""


def test_killed_while_it_has_the_lock_and_a_step_half_done(tmp_path):
    out = tmp_path / "model"
    with subprocess.Popen(
        [sys.executable, "-c", _KILLED.format(out=str(out))], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "now\n"
        assert "another conversion to this output is running" in refusal(out, {"rank": 64})
        process.send_signal(signal.SIGKILL)
    with Work.open(out, {"rank": 64}) as work:
        assert work.done("layer_00") and not work.done("layer_01")
        with work.step("layer_01") as folder:
            assert list(folder.iterdir()) == []


def test_another_conversion_is_refused_by_its_first_difference(tmp_path):
    out = tmp_path / "model"
    with Work.open(out, PRINT) as work, work.step("layer_00"):
        pass
    other = PRINT | {"settings": {"rank": 96, "fraction": 0.3}}
    assert "an unfinished conversion with settings.rank 64 instead of 96; delete it" in refusal(out, other)
    assert 'source "abc" instead of null' in refusal(out, {k: v for k, v in PRINT.items() if k != "source"})
    with Work.open(out, other, restart=True) as work:
        assert not work.done("layer_00")
    assert json.loads((work.folder / "fingerprint.json").read_text()) == other
    assert "settings.rank 96 instead of 64" in refusal(out)


def test_places_that_are_not_ours(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert "is not empty" in refusal(tmp_path / "model")
    (tmp_path / "new.converting").mkdir()
    (tmp_path / "new.converting" / "thesis.tex").write_text("mine")
    assert "is no work folder of a conversion (it holds thesis.tex)" in refusal(tmp_path / "new")
    assert "is no work folder" in refusal(tmp_path / "new", restart=True)
    (tmp_path / "new2.converting").write_text("mine")
    assert "new2.converting: cannot be written: File exists" in refusal(tmp_path / "new2")
    (tmp_path / "torn.converting").mkdir()
    (tmp_path / "torn.converting" / "fingerprint.json").write_text("{")
    assert "not valid JSON" in refusal(tmp_path / "torn")
    assert "convert to a local folder" in refusal("gs://bucket/model")


def test_a_full_disk_keeps_what_is_finished(tmp_path):
    with Work.open(tmp_path / "model", PRINT) as work:
        with work.step("layer_00") as folder:
            save_arrays(folder, {"a": np.arange(3)})
        with pytest.raises(UserError, match="the disk is full; finished steps are kept") as caught:
            with work.step("layer_01") as folder:
                # A device on which every write fails as on a full disk.
                os.symlink("/dev/full", folder / "a.npy")
                save_arrays(folder, {"a": np.zeros(1 << 16)})
        assert "\n" not in str(caught.value)
        assert work.done("layer_00") and not work.done("layer_01")
        with pytest.raises(OSError, match="elsewhere"), work.step("layer_01"):
            raise OSError(errno.EIO, "elsewhere")


def test_room_is_looked_for_before_the_start(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with Work.open(tmp_path / "model", PRINT) as work:
        work.require_space(1000)
        with pytest.raises(UserError, match=r"needs [\d.]+ GB more on this disk and [\d.]+ GB are free"):
            work.require_space(2 * free)
        with work.step("layer_00") as folder, (folder / "sparse").open("wb") as file:
            file.truncate(2 * free)
        # Counted off: it is there already.
        work.require_space(2 * free)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, bool, ml_dtypes.bfloat16, np.float16])
def test_arrays_come_back_mapped(tmp_path, dtype):
    rng = np.random.default_rng(0)
    arrays = {"a": rng.standard_normal((3, 4, 5)).astype(dtype), "b.c": np.ones((), dtype)}
    arrays["turned"] = arrays["a"].T
    arrays["none"] = np.zeros((0, 2), dtype)
    with Work.open(tmp_path / "model", PRINT) as work:
        with work.step("moments") as folder:
            save_arrays(folder, arrays)
        found = work.arrays("moments")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and not found[name].flags.writeable
        np.testing.assert_array_equal(found[name], array)
    assert isinstance(found["a"], np.memmap)
