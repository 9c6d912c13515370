"""What an experiment says about collecting rollouts, and the refusal of stages that cannot work."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from iv3jax.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from iv3jax.train.config import TrainConfig

STAGES = ("supervised", "rl", "distill")


@dataclass(frozen=True)
class CollectConfig:
    """How a stage comes by its rollouts.

    Attributes:
        prompts: questions that are learned from at one time. group: rollouts of each. Together they are the
            rows of one or more steps.
        attempts: how often so many questions are asked, at most, to find as many groups whose rollouts differ
            in their rewards; 1 takes what comes, as distillation does.
        frames: temporal patches of the overview that a prompt shows.
        questions: a file of `iv3 data choose`; those that it keeps are asked over and over, and no others.
    """

    prompts: int = 8
    group: int = 8
    attempts: int = 2
    frames: int = 8
    questions: str = ""

    def __post_init__(self) -> None:
        for name in ("prompts", "group", "attempts", "frames"):
            if getattr(self, name) < 1:
                raise UserError(f"collect.{name} {getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class TracesConfig:
    """Rollouts for people to read (`iv3 trace show`), in OUT/traces/STEP.jsonl.

    Attributes:
        every: steps between two files; 0: none. count: rollouts in a file, at most.
    """

    every: int = 0
    count: int = 16


def check_stage(config: "TrainConfig") -> None:
    """Raises UserError for a stage that is not one, or that its other fields make impossible."""
    if config.stage not in STAGES:
        near = did_you_mean(config.stage, STAGES)
        raise UserError(f"stage {config.stage!r} is not one of {', '.join(STAGES)}{near}")
    if config.stage == "supervised":
        return
    collect, rows = config.collect, config.rows * config.accumulate
    rollouts = collect.prompts * collect.group
    if config.stage == "distill":
        _check_distillation(config)
    elif collect.group < 2:
        raise UserError(
            f"collect.group {collect.group}: a group of one has no other rollouts to be compared with; make "
            "it 2 or more"
        )
    if rollouts % rows:
        raise UserError(
            f"collect: {collect.prompts} prompts x {collect.group} rollouts are {rollouts}, no multiple of "
            f"the {rows} rows of a step (rows x accumulate)"
        )
    together = rollouts // rows
    for name, value in (
        ("steps", config.steps),
        ("checkpoint.every", config.checkpoint.every),
        ("traces.every", config.traces.every),
    ):
        if value % together:
            raise UserError(
                f"{name} {value} is no multiple of {together}, the steps that learn from what is collected "
                "at one time (collect.prompts x collect.group / rows / accumulate)"
            )
    if config.length <= config.rollout.budget:
        raise UserError(
            f"length {config.length} is a prompt and rollout.budget {config.rollout.budget} together; there "
            "is no room for the prompt"
        )
    if config.rollout.sampling.temperature == 0:
        raise UserError(
            "rollout.sampling.temperature is 0 (greedy); sample with 1 to learn from what is sampled"
        )
    if not config.data.sources:
        raise UserError("data.sources: is empty; name the tasks to ask about, of kind task:NAME")
    for source in config.data.sources:
        if not source.kind.startswith("task:"):
            raise UserError(
                f"data.sources: {source.kind} is no synthetic task; rollouts are made of sources of kind "
                "task:NAME"
            )
    for axis in ("context", "tensor"):
        if (size := getattr(config.mesh, axis)) != 1:
            raise UserError(f"mesh.{axis} {size}: rollouts are not split over it; make it 1")
    if config.held_out.every:
        raise UserError("held_out.every: held-out loss is of the supervised stages; set it to 0")


def _check_distillation(config: "TrainConfig") -> None:
    distill, collect = config.distill, config.collect
    if collect.attempts > 1:
        raise UserError(
            f"collect.attempts {collect.attempts}: distillation learns from every rollout, none is replaced; "
            "make it 1"
        )
    if not distill.teacher and distill.frames <= collect.frames:
        raise UserError(
            "distill.teacher: is empty, so the teacher is the model itself as the run began; let it see more "
            f"than the student with distill.frames above {collect.frames}, or name another model"
        )
