"""The collector: questions are asked, the policy as it is answers, and rewards make a batch to learn from.

A round asks `prompts` questions, `group` times each, and again while too many groups have equal rewards. It
gives the batches of `together` steps. What a round does follows from the config, its number and the
parameters alone, so nothing of it is saved. Rewards and answers are all that goes through the host.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from iv3jax.mcr.environment import Asked, Environment
from iv3jax.mcr.rewards import PARTS, Reward
from iv3jax.mcr.trace import make_trace, write_traces
from iv3jax.mcr.trajectories import FREE, Trajectories
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.paths import AnyPath
from iv3jax.train.collect_batch import logprobs, part_of, regrouped, rows_of
from iv3jax.train.config import TrainConfig
from iv3jax.train.distill import TEACHER
from iv3jax.train.feeds import Ready
from iv3jax.train.lesson import Lesson
from iv3jax.train.policy import Rules
from iv3jax.train.policy_batch import PolicyBatch
from iv3jax.train.rl import advantages
from iv3jax.train.rl_filter import mixed, pick
from iv3jax.train.trainable import join
from iv3jax.typing import Params

TRACES = "traces"
"""Where in OUT rollouts are written to be read."""


def together(config: TrainConfig) -> int:
    """Steps that learn from one round."""
    return config.collect.prompts * config.collect.group // (config.rows * config.accumulate)


@dataclass(frozen=True)
class _Attempt:
    """So many questions, answered. The trajectories and rewards are on the host, rewards (P, G)."""

    asked: Asked
    trajectories: Trajectories
    rewards: list[Reward]
    totals: np.ndarray
    useful: float
    waited: float


class RolloutCollector:
    """Batches of rollouts (`feeds.Collector`)."""

    def __init__(
        self,
        config: TrainConfig,
        model: InternVideo3,
        environment: Environment,
        mesh: Mesh,
        out: AnyPath | None,
        lanes: int,
        lesson: Lesson | None = None,
    ) -> None:
        """Nothing is done yet but the first questions, in a thread.

        Args:
            out: the run's folder, for traces. lanes: rows of this host's part of a step.
            lesson: what is learned from, if not rewards.
        """
        self._config, self._model, self._environment = config, model, environment
        self._out, self._lanes, self._lesson = out, lanes, lesson
        self._rules = Rules(environment.grammar, environment.config.sampling)
        self._unfiltered = self._rules.unfiltered
        self._key = jax.random.key(config.seed)
        whole = NamedSharding(mesh, PartitionSpec())
        self._everywhere = jax.jit(lambda tree: tree, out_shardings=whole)
        self._pool = ThreadPoolExecutor(1)
        self._asked: dict[tuple[int, int], Future[Asked]] = {}
        self._batch: PolicyBatch | None = None
        self._names: tuple[str, ...] = ()

    def collect(self, step: int, params: Params, frozen: Params) -> Ready:
        """The rows of a step, counted from 0; the first step of a round rolls out."""
        rows = self._config.rows * self._config.accumulate
        number, place = divmod(step, together(self._config))
        numbers: dict[str, float] = {}
        waited = 0.0
        if place == 0:
            self._batch = None
            started = time.perf_counter()
            self._batch, attempts, kept = self._round(number, params, frozen)
            numbers = _numbers(attempts, kept)
            numbers["collect_seconds"] = time.perf_counter() - started
            waited = sum(attempt.waited for attempt in attempts)
            self._names = tuple(name for attempt in attempts for name in attempt.asked.names)
            self._write(step + together(self._config), attempts)
        assert self._batch is not None, "steps are asked for one after the other, from the first of a round"
        batch = part_of(self._batch, rows, jnp.int32(place * rows))
        tokens = int(self._everywhere(jnp.sum(batch.batch.segment_ids != 0))) // jax.process_count()
        state = np.full((self._lanes, 1), step + 1, np.int64)
        return Ready(batch, self._names, tokens, state, waited, numbers)

    def close(self) -> None:
        """Ends the thread."""
        self._pool.shutdown(cancel_futures=True)

    def _round(self, number: int, params: Params, frozen: Params) -> tuple[PolicyBatch, list[_Attempt], int]:
        """What is learned from, all that was rolled out, and how many groups of it have mixed outcomes."""
        collect = self._config.collect
        whole = {name: x for name, x in join(params, frozen).items() if name != TEACHER}
        batch, attempts = self._attempt(number, 0, whole, frozen)
        rewards, done = attempts.totals, [attempts]
        for again in range(1, collect.attempts):
            if mixed(rewards).all():
                break
            more, attempt = self._attempt(number, again, whole, frozen)
            done.append(attempt)
            picked = pick([rewards, attempt.totals], collect.prompts)
            groups = picked.rollout * collect.prompts + picked.group
            rewards = np.concatenate([rewards, attempt.totals])[groups]
            rows = (groups[:, None] * collect.group + np.arange(collect.group)).ravel()
            batch = regrouped(batch, more, rows)
        return self._finished(batch, rewards, whole, frozen), done, int(mixed(rewards).sum())

    def _attempt(
        self, number: int, attempt: int, params: Params, frozen: Params
    ) -> tuple[PolicyBatch, _Attempt]:
        environment, collect = self._environment, self._config.collect
        start = time.perf_counter()
        asked = self._take(number, attempt)
        waited = time.perf_counter() - start
        if self._lesson is None:
            prompts, trajectories, work = environment.roll(params, asked, self._key, collect.group)
            batch = rows_of(trajectories, prompts)
        else:
            teacher, given = frozen[TEACHER], (asked, self._key, collect.group)
            prompts, trajectories, work = self._lesson.roll(environment, params, teacher, *given)
            batch = rows_of(trajectories, prompts)
            batch = self._lesson(batch, trajectories, prompts, asked, teacher)
        trajectories, work = jax.device_get(self._everywhere((trajectories, work)))
        rewards = environment.rewards(self._config.reward, asked, trajectories)
        totals = np.array([one.total for one in rewards]).reshape(collect.prompts, collect.group)
        return batch, _Attempt(asked, trajectories, rewards, totals, work.useful, waited)

    def _finished(
        self, batch: PolicyBatch, rewards: np.ndarray, params: Params, frozen: Params
    ) -> PolicyBatch:
        """The batch with what the objective needs beside the rollouts."""
        config = self._config
        if self._lesson is not None:
            return batch
        parts = config.collect.prompts * config.collect.group // config.rows
        old = logprobs(self._model, self._rules, params, parts, batch)
        reference = None
        if TEACHER in frozen and config.rl.kl == "k2":
            reference = logprobs(self._model, self._unfiltered, frozen[TEACHER], parts, batch)
        relative = advantages(jnp.asarray(rewards), config.rl.kind).reshape(-1)
        return batch._replace(old=old, advantages=relative, reference=reference)

    def _take(self, number: int, attempt: int) -> Asked:
        """The questions of an attempt; those that may come next are begun with."""
        wanted = self._ask(number, attempt)
        self._asked = {key: value for key, value in self._asked.items() if key >= (number, attempt)}
        if attempt + 1 < self._config.collect.attempts:
            self._ask(number, attempt + 1)
        self._ask(number + 1, 0)
        return wanted.result()

    def _ask(self, number: int, attempt: int) -> Future[Asked]:
        collect, key = self._config.collect, (number, attempt)
        if key not in self._asked:
            first = (number * collect.attempts + attempt) * collect.prompts
            self._asked[key] = self._pool.submit(self._environment.asked, first, collect.prompts)
        return self._asked[key]

    def _write(self, step: int, attempts: Sequence[_Attempt]) -> None:
        """Some of the first rollouts, if it is their turn, named by the last step that learns from them."""
        traces = self._config.traces
        due = traces.every and step % traces.every == 0
        if self._out is None or not due or jax.process_index():
            return
        first = attempts[0]
        rows = range(min(traces.count, len(first.rewards)))
        ids = np.asarray(first.asked.ids)
        write_traces(
            self._out / TRACES / f"{step}.jsonl",
            [
                make_trace(
                    self._environment.tokenizer, first.trajectories, row, ids, _shown(first.rewards[row])
                )
                for row in rows
            ],
        )


def _shown(reward: Reward) -> dict[str, float]:
    return {"total": reward.total} | reward.parts


def _numbers(attempts: Sequence[_Attempt], kept: int) -> dict[str, float]:
    """Of all rollouts of a round, those that are not learned from included."""
    rewards = [one for attempt in attempts for one in attempt.rewards]
    groups = sum(len(attempt.totals) for attempt in attempts)

    def mean(values: Any) -> float:
        return float(np.mean([np.mean(x) for x in values]))

    shown = [attempt.trajectories for attempt in attempts]
    return {
        "reward": float(np.mean([one.total for one in rewards])),
        **{f"reward_{name}": float(np.mean([one.parts[name] for one in rewards])) for name in PARTS},
        "answered": mean(x.answered for x in shown),
        "overflow": mean(x.overflow for x in shown),
        "calls": mean((x.calls.tools >= 0).sum(axis=1) for x in shown),
        "free_tokens": mean((x.kinds == FREE).sum(axis=1) for x in shown),
        "rollout_tokens": mean(x.length for x in shown),
        "useful_decoding": mean(attempt.useful for attempt in attempts),
        "groups": groups,
        "equal_groups": groups - sum(int(mixed(attempt.totals).sum()) for attempt in attempts),
        "learned_groups": kept,
    }
