"""`iv3 bench rollout`: the compiled loop beside a host loop that feeds the whole conversation at every turn.

That is what RL libraries do whose sampler knows prompts and completions only: a turn's conversation is a new
prompt, padded to the next power of two, in a batch of the rollouts that still run, padded so too. Model,
questions, grammar and tools are the same, and so is the code of a decode step; what differs is what is fed
again, who waits for whom, and that the host is asked at every turn. Compiling is not counted for either.
"""

import statistics
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from iv3jax.bench.table import as_text
from iv3jax.checkpoint.run_folder import shape_folder
from iv3jax.data.processor import Processor
from iv3jax.data.tokenizer import TINY_FOLDER
from iv3jax.mcr.environment import Environment
from iv3jax.mcr.grammar import LAST, START
from iv3jax.mcr.language import ANSWER, TOOLS
from iv3jax.mcr.memory import Memory, empty_memory
from iv3jax.mcr.prompts import Prompts, fill_bank
from iv3jax.mcr.rollout import prepare, rollout
from iv3jax.mcr.step import DECIDING, IDLE, Given, Loop, Work, called, look, speak, start
from iv3jax.mcr.tools import Observation
from iv3jax.mcr.trajectories import PROMPT, Record
from iv3jax.models.config import ModelConfig
from iv3jax.models.internvideo3 import InternVideo3, init_params
from iv3jax.models.presets import preset
from iv3jax.paths import AnyPath
from iv3jax.sharding import make_mesh
from iv3jax.train.collect_job import environment_of
from iv3jax.train.config import experiment
from iv3jax.train.model import load_params, model_of
from iv3jax.typing import Array, Params

EXPERIMENT = "rl:tiny"
ROUNDS = 5


@dataclass(frozen=True)
class Row:
    """Of one loop, medians over the rounds.

    Attributes:
        rollouts_per_second: finished ones. tokens: of a rollout after its prompt, mean.
        calls: of a rollout, mean.
        useful: share of the row-steps of decoding in which a rollout needed the tokens.
    """

    name: str
    rollouts_per_second: float
    tokens: float
    calls: float
    useful: float


@dataclass(frozen=True)
class _Lab:
    """What both loops roll out. group: of each prompt."""

    model: InternVideo3
    params: Params
    environment: Environment
    prompts: Prompts
    group: int


class _Count(NamedTuple):
    tokens: float
    calls: float
    useful: float


def bench_rollout(
    folder: str | None = None, rounds: int = ROUNDS, overrides: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Both loops in turns, `rounds` times each, after the same rounds once without counting.

    Args:
        folder: a model of the tiny shape; None takes random weights, which call every tool.
        overrides: of the experiment whose questions and rollouts are taken.
    """
    config = experiment(EXPERIMENT, overrides)
    if folder is None:
        model = model_of(config, preset(config.preset))
        place: AnyPath = TINY_FOLDER
        params = init_params(model, jax.random.key(config.seed))
    else:
        place = shape_folder(folder)
        model = model_of(config, ModelConfig.from_file(place))
        params = load_params(folder, model.run, make_mesh(jax.devices()[:1]))
    environment = environment_of(config, model, Processor.from_dir(place, model.config))
    asked = environment.asked(0, config.collect.prompts)
    prompts = environment.prompts(params, asked)
    lab = _Lab(model, params, environment, prompts, config.collect.group)
    loops = {
        "compiled loop": partial(_compiled, lab),
        "host loop, conversation fed at every turn": partial(_hosted, lab),
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    counts: dict[str, list[_Count]] = {name: [] for name in loops}
    keys = [jax.random.key(i) for i in range(rounds)]
    # With all of the keys, so that every shape that the host loop meets is compiled.
    for run in loops.values():
        for key in keys:
            run(key)
    for number, key in enumerate(keys):
        turns = list(loops.items())
        for name, run in turns if number % 2 else reversed(turns):
            begun = time.perf_counter()
            counts[name].append(run(key))
            seconds[name].append(time.perf_counter() - begun)
    many = config.collect.prompts * config.collect.group
    rows = [
        Row(
            name,
            many / statistics.median(seconds[name]),
            *map(statistics.median, zip(*counts[name], strict=True)),
        )
        for name in loops
    ]
    return {
        "experiment": EXPERIMENT,
        "rollouts": many,
        "slots": config.rollout.slots,
        "rounds": rounds,
        "ratio": rows[0].rollouts_per_second / rows[1].rollouts_per_second,
        "rows": [asdict(row) for row in rows],
    }


def _compiled(lab: _Lab, key: Array) -> _Count:
    environment = lab.environment
    given = (environment.config, environment.grammar, environment.words)
    found, work = jax.device_get(rollout(lab.model, lab.params, lab.prompts, *given, key, lab.group))
    return _Count(
        float((found.kinds > PROMPT).sum(axis=1).mean()),
        float((found.calls.tools >= 0).sum(axis=1).mean()),
        work.useful,
    )


@dataclass
class _Conversation:
    """A rollout of the host loop: what was said so far, on the host."""

    number: int
    prompt: int
    tokens: np.ndarray
    positions: np.ndarray
    visual: np.ndarray
    start: int

    def add(self, tokens: np.ndarray, positions: np.ndarray, visual: np.ndarray) -> None:
        """More of it."""
        self.tokens = np.concatenate([self.tokens, tokens])
        self.positions = np.concatenate([self.positions, positions], axis=1)
        self.visual = np.concatenate([self.visual, visual])


def _hosted(lab: _Lab, key: Array) -> _Count:
    """As many rollouts as slots at a time, turn by turn, until each of them has answered."""
    model, environment, prompts, group = lab.model, lab.environment, lab.prompts, lab.group
    spend = environment.config
    loop = prepare(model, prompts, spend, environment.grammar, environment.words, group)
    _, tokens, segment_ids, positions, visual = jax.device_get(prompts[:-1])
    talks = []
    for row in range(len(tokens) * group):
        i = row // group
        real = segment_ids[i] != 0
        own = (tokens[i, real], positions[:, i, real], visual[i, real])
        talks.append(_Conversation(row, i, *own, int(real.sum())))
    calls, choices, decoded = 0, 0, 0
    for first in range(0, len(talks), spend.slots):
        active = list(range(first, min(first + spend.slots, len(talks))))
        memory = empty_memory(_power(len(active)), spend.tools.memory, spend.grammar.longest_text)
        for step in range(spend.steps):
            rows = _power(len(active))
            padded = np.array(active + active[:1] * (rows - len(active)))
            asked = _batch([talks[i] for i in padded], prompts)
            left = np.array([spend.budget - len(talks[i].tokens) + talks[i].start for i in padded])
            need = loop.lengths.step + loop.lengths.observation + loop.lengths.answer
            last = (left < need) | (step == spend.steps - 1)
            real = np.arange(rows) < len(active)
            step_key = jax.random.fold_in(key, step)
            given = Given(lab.params, asked, environment.grammar, environment.words, step_key)
            size = Loop(model, replace(spend, slots=rows, budget=loop.lengths.step), loop.lengths, 1)
            record, length, position, tool, heard, memory, work = jax.device_get(
                _turn(size, given, last, real, jnp.int32(step), memory)
            )
            calls += len(active)
            choices, decoded = choices + int(work.choices), decoded + int(work.decoded)
            going = []
            for at, i in enumerate(active):
                said = slice(0, length[at])
                talks[i].add(record.tokens[at, said], record.positions[:, at, said], record.visual[at, said])
                if tool[at] == TOOLS.index(ANSWER):
                    continue
                told = heard.real[at]
                where = position[at] + heard.offsets[:, at][:, told]
                talks[i].add(heard.tokens[at][told], where, heard.visual[at][told])
                going.append(at)
            if not going:
                break
            active = [active[at] for at in going]
            again = np.array(going + going[:1] * (_power(len(going)) - len(going)))
            memory = jax.tree.map(lambda x, again=again: x[again], memory)
    return _Count(
        float(np.mean([len(one.tokens) - one.start for one in talks])),
        calls / len(talks),
        choices / decoded,
    )


def _power(number: int) -> int:
    """The least power of two that is no smaller."""
    return 1 << (number - 1).bit_length()


def _batch(talks: list[_Conversation], prompts: Prompts) -> Prompts:
    """Conversations as new prompts, as long as the longest, to the next power of two."""
    width = _power(max(len(one.tokens) for one in talks))

    def padded(x: np.ndarray, fill: int = 0) -> np.ndarray:
        return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])], constant_values=fill)

    prompt = np.array([one.prompt for one in talks])
    return Prompts(
        jnp.asarray([one.number for one in talks], jnp.int32),
        jnp.asarray(np.stack([padded(one.tokens) for one in talks])),
        jnp.asarray(np.stack([padded(np.ones_like(one.tokens)) for one in talks])),
        jnp.asarray(np.stack([padded(one.positions) for one in talks], axis=1)),
        jnp.asarray(np.stack([padded(one.visual, -1) for one in talks])),
        jax.tree.map(lambda x: x[prompt], prompts.world),
    )


_Said = tuple[Record, Array, Array, Array, Observation, Memory, Work]


@partial(jax.jit, static_argnums=0)
def _turn(loop: Loop, given: Given, last: Array, real: Array, step: Array, memory: Memory) -> _Said:
    """Whole conversations in, the next call of each and what its tool says out."""
    bank = fill_bank(loop.model, given.params, given.prompts, loop.config.cache_dtype)
    state = start(loop, given, bank)
    state = state._replace(
        phase=jnp.where(real, DECIDING, IDLE),
        grammar_state=jnp.where(last, LAST, START),
        step=jnp.full_like(state.step, step),
        rows=state.rows._replace(memory=memory),
    )
    state = speak(loop, given, state)
    observation, memory = look(loop, given, state)
    rows = state.rows
    return rows.record, rows.length, state.position, called(given, state), observation, memory, state.work


def format_table(result: dict[str, Any]) -> str:
    """The rows as a table for people."""
    table = Table(
        title=f"{result['rollouts']} rollouts of {result['experiment']}, {result['slots']} at a time",
        caption=f"medians of {result['rounds']} rounds in turns; {result['ratio']:.1f}×",
    )
    table.add_column("")
    for head in ("rollouts/s", "tokens", "calls", "useful decoding"):
        table.add_column(head, justify="right")
    for row in result["rows"]:
        table.add_row(
            row["name"],
            f"{row['rollouts_per_second']:.1f}",
            f"{row['tokens']:.0f}",
            f"{row['calls']:.2f}",
            f"{row['useful']:.2f}",
        )
    return as_text(table, 110)
