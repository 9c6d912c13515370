"""The memory against a list that loses its oldest evidence."""

import jax
import numpy as np

from iv3jax.mcr.memory import CROP, EMPTY, NOTE, ZOOM, Memory, empty_memory, remember

ROWS, SLOTS, TEXT = 16, 3, 4
REMEMBER = jax.jit(remember)


def entries(memory: Memory, row: int) -> list[tuple]:
    """The used slots of a row: kind, window, text as far as it is real, step."""
    kinds, windows, texts, lengths, steps, _ = (np.asarray(x[row]) for x in memory)
    used = int((kinds != EMPTY).sum())
    assert (kinds[:used] != EMPTY).all()
    said = [texts[i, : lengths[i]].tolist() for i in range(used)]
    return [(int(kinds[i]), windows[i].tolist(), said[i], int(steps[i])) for i in range(used)]


def test_as_a_list_would():
    rng = np.random.default_rng(0)
    memory, lists, dropped = empty_memory(ROWS, SLOTS, TEXT), [[] for _ in range(ROWS)], [0] * ROWS
    for step in range(15):
        write = rng.random(ROWS) < 0.7
        kind = rng.choice([ZOOM, CROP, NOTE, NOTE], ROWS)
        window = rng.integers(0, 99, (ROWS, 2))
        text = rng.integers(0, 99, (ROWS, TEXT))
        length = np.where(kind == NOTE, rng.integers(0, TEXT + 1, ROWS), 0)
        given = (kind, window, text, length, np.full(ROWS, step))
        memory = REMEMBER(memory, write, *(x.astype(np.int32) for x in given))
        for row in np.flatnonzero(write):
            own = lists[row]
            if len(own) == SLOTS:
                evidence = [i for i, entry in enumerate(own) if entry[0] in (ZOOM, CROP)]
                del own[evidence[0] if evidence else 0]
                dropped[row] += 1
            said = text[row, : length[row]].tolist()
            own.append((int(kind[row]), window[row].tolist(), said, step))
        for row in range(ROWS):
            assert entries(memory, row) == lists[row]
        assert memory.dropped.tolist() == dropped
    assert min(dropped) > 0


def test_a_note_outlives_evidence():
    memory = empty_memory(1, 2, 1)
    for step, kind in enumerate([NOTE, ZOOM, CROP, ZOOM]):
        zero = np.zeros((1, 2), np.int32)
        given = (zero[0, :1] + kind, zero, zero[:, :1], zero[0, :1], zero[0, :1] + step)
        memory = REMEMBER(memory, np.ones(1, bool), *given)
    assert [e[0] for e in entries(memory, 0)] == [NOTE, ZOOM]
    assert [e[3] for e in entries(memory, 0)] == [0, 3]
    assert memory.dropped.tolist() == [2]
