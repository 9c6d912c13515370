"""Synthetic long-video tasks: real clips, real handwriting, known answers and ceilings. Their names are here.

| name | question | answer |
|---|---|---|
| `read` | which number is shown, in a short video that shows one throughout | the number |
| `at` | which number is shown at a time | the number |
| `when` | when is a number shown, for seconds at a time | start and end |
| `chase` | follow a time that is shown at a time, `hops` times, to a number | the number |
| `ground` | when is a number shown, for less time than lies between frames | start and end |
| `count` | how many times is a number shown | 1 to `most` |
| `order` | which of two numbers is shown first | the number |

`judge.score` judges an answer, `baselines.baselines` says what a score must be compared with, and
`python -m iv3jax.data.tasks NAME OUT.mp4` writes an episode to look at.
"""

from collections.abc import Callable
from functools import partial

from iv3jax.data.tasks.chase import Chase
from iv3jax.data.tasks.count import Count
from iv3jax.data.tasks.ground import Ground
from iv3jax.data.tasks.order import Order
from iv3jax.data.tasks.reading import At, Read, When
from iv3jax.data.tasks.source import TaskSource, make_source
from iv3jax.data.tasks.task import Task
from iv3jax.data.tasks.traces import TraceSource, make_traces

KINDS: dict[str, type[Task]] = {
    "read": Read,
    "at": At,
    "when": When,
    "chase": Chase,
    "ground": Ground,
    "count": Count,
    "order": Order,
}

TASKS: dict[str, Callable[[tuple[str, ...]], TaskSource]] = {
    name: partial(make_source, name, kind) for name, kind in KINDS.items()
}
"""What makes a source of a task from its `key=value` options: the task's fields and `source.View`'s."""

TRACES: dict[str, Callable[[tuple[str, ...]], TraceSource]] = {
    name: partial(make_traces, f"trace:{name}", kind) for name, kind in KINDS.items()
}
"""The same of a task's scripted traces: the task's fields and `traces.Script`'s."""
