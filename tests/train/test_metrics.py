"""A run's numbers on the disk: kept by step, and cut back to the checkpoint that a run goes on from."""

import json

from iv3jax.train.metrics import FILE, MetricLog


def lines(folder):
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def test_lines_after_the_checkpoint_are_dropped(tmp_path):
    log = MetricLog(tmp_path, 0, {})
    for step in range(1, 6):
        log.write(step, {"loss": 1 / step})
    log.close()
    # A kill cut the last line short.
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 6, "lo')
    log = MetricLog(tmp_path, 3, {})
    log.write(4, {"loss": 0.5})
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert lines(tmp_path)[-1] == {"step": 4, "loss": 0.5}
    assert list((tmp_path / "tensorboard").iterdir())
