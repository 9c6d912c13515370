"""RolloutConfig: what a rollout may spend, and the refusal of one that cannot work, before compiling."""

from dataclasses import dataclass, field

from iv3jax.errors import UserError
from iv3jax.generate.sampling import Sampling
from iv3jax.mcr.grammar import GrammarConfig
from iv3jax.mcr.tools import ToolConfig


@dataclass(frozen=True)
class RolloutConfig:
    """How rollouts are made.

    Attributes:
        steps: calls at most, the answer among them; the last step must answer.
        budget: tokens at most after the prompt, of all kinds: thoughts, calls and observations.
        slots: rollouts that run side by side, on all devices together; the others wait for one that has
            ended.
        sampling: how tokens are chosen among those the grammar allows.
        grammar: what may be said.
        tools: what the tools show.
        patience: tools are run when this share of the running rollouts waits for them. With 1 all keep step
            and wait for the longest call; with less, passes for observations are more and emptier.
        capacity: cache slots of a row; None is what the longest prompt and the budget need. With fewer, a
            rollout that finds no room ends there, flagged.
        cache_dtype: of models.cache.CACHE_DTYPES; None is the model's compute dtype.
    """

    steps: int = 8
    budget: int = 1024
    slots: int = 16
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=1.0))
    grammar: GrammarConfig = field(default_factory=GrammarConfig)
    tools: ToolConfig = field(default_factory=ToolConfig)
    patience: float = 1.0
    capacity: int | None = None
    cache_dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "budget", "slots"):
            if getattr(self, name) < 1:
                raise UserError(f"rollout: {name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.patience <= 1:
            raise UserError(f"rollout: patience is {self.patience}; it must be above 0 and at most 1")


@dataclass(frozen=True)
class Lengths:
    """What the grammar and the tools can need at most, in tokens.

    Attributes:
        run: fed after one choice: the token chosen and those forced after it. A longer run goes on in the
            next pass.
        step: of a step, its `<|im_end|>` included; `answer`: of a step that must answer.
        observation: of an observation.
    """

    run: int
    step: int
    answer: int
    observation: int


def check_rollout(config: RolloutConfig, lengths: Lengths, prompt_tokens: int, most: int, group: int) -> None:
    """Refuses what cannot work.

    Args:
        prompt_tokens: T0 of the prompts.
        most: the model's max_position_embeddings.
        group: rollouts of each prompt.

    Raises:
        UserError: no rollouts, a budget without room for the answer or for one step before it, a capacity
            below the prompts' length, or more tokens than the model has positions for.
    """
    if group < 1:
        raise UserError(f"rollout: a group of {group}; it must be at least 1")
    needed, before = lengths.answer, ""
    if config.steps > 1:
        needed += lengths.step + lengths.observation
        before = f"a step of {lengths.step}, its observation of {lengths.observation} and "
    if config.budget < needed:
        raise UserError(
            f"rollout: the budget of {config.budget} tokens is smaller than {needed}, which {before}"
            f"an answer of {lengths.answer} may take"
        )
    if config.capacity is not None and config.capacity < prompt_tokens:
        raise UserError(
            f"rollout: the capacity of {config.capacity} tokens is smaller than the prompts, {prompt_tokens}"
        )
    if prompt_tokens + config.budget > most:
        raise UserError(
            f"rollout: prompts of {prompt_tokens} tokens and a budget of {config.budget} are more than the "
            f"model's max_position_embeddings, {most}"
        )
