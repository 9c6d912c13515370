"""The stages' bench: what it asks, which experiments it runs, its table. No test trains them."""

from iv3jax.bench.stages import CHAINS, SECONDS, STAGES, format_table, questions
from iv3jax.train.config import experiment


def test_questions_are_the_same_for_a_seed_and_as_long_as_they_say():
    first, again, other = questions(3, 1), questions(3, 1), questions(3, 2)
    assert [a.name for a in first] == ["at 8 s", "at 16 s", "at 64 s", "when 8 s", "when 16 s", "when 64 s"]
    for a, b in zip(first, again, strict=True):
        assert [c.questions for c in a.cases] == [c.questions for c in b.cases]
        assert all(c.episode.duration == a.seconds and len(c.times) == 2 * a.seconds for c in a.cases)
        assert {c.episode.split for c in a.cases} == {"test"}
    assert [c.questions for c in first[0].cases] != [c.questions for c in other[0].cases]


def test_long_is_eight_times_short():
    configs = {stage: experiment(name) for stage, name in STAGES.items()}
    assert {s for chain in CHAINS for s in chain} == set(STAGES)
    assert configs["long"].length >= 8 * configs["short"].length
    asked = {o for s in configs["long"].data.sources for o in s.options if o.startswith("seconds")}
    # The short ones stay in the mixture.
    assert asked == {f"seconds=16,{SECONDS[-1]}", "seconds=5,16"}


def test_table():
    rows = [dict(name="source", steps=0, scores={"at 8 s": [0.5, 0.25, 0.8]})]
    shown = format_table(dict(videos=4, seed=1, ceilings={"at 8 s": 0.75}, rows=rows))
    assert "0.50" in shown and "0.25–0.80" in shown and "perfect eyes" in shown and "0.75" in shown
