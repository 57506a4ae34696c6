"""A served policy as the object that evaluation code calls `predict` of."""

import itertools
from collections.abc import Mapping
from typing import Any, TypeVar

from numpy.typing import ArrayLike, NDArray

from lom_client.client import PolicyClient
from lom_client.observations import GOAL_KEYS, Observations, goal_as_vector

_State = TypeVar("_State")


class ServedPolicy:
    """Plays a served policy where a model of stable-baselines3 could stand, as in its `evaluate_policy`.

    **Threads**: as `PolicyClient`; each prediction blocks up to its deadline.
    """

    def __init__(
        self, client: PolicyClient, *, deadline_s: float = 1.0, variant: str | None = None, seed: int = 0
    ) -> None:
        """Nothing is asked yet; the client stays the caller's.

        Args:
            client: asks the policy.
            deadline_s: for each prediction, as for `PolicyClient.act`.
            variant: as for `PolicyClient.act`.
            seed: of the first prediction that samples; each further one counts one up.
        """
        self._client = client
        self._deadline_s = deadline_s
        self._variant = variant
        self._seeds = itertools.count(seed)

    def predict(
        self,
        observation: Observations,
        state: _State | None = None,
        episode_start: ArrayLike | None = None,
        deterministic: bool = True,
    ) -> tuple[NDArray[Any], _State | None]:
        """The actions for these observations, in environment units, and `state` as it was.

        **Shapes**: `[O]` gives float32[A], `[N, O]` float32[N, A]. A mapping with `observation` and `desired_goal`, of
        a goal environment, counts as their concatenation, unless the policy itself has several inputs.

        Args:
            observation: one, or one row for each environment of a vector.
            state: nothing here has a memory.
            episode_start: means nothing without one.
            deterministic: False samples from the chosen component, of a variant that has one.

        Raises:
            InvalidRequest: as for `PolicyClient.act`; BAD_OPTION where a variant without components should sample.
            PolicyError: any other failure; no action is made up.
        """
        if isinstance(observation, Mapping) and all(key in observation for key in GOAL_KEYS):
            spec = self._client.get_spec(deadline_s=self._deadline_s)
            if len(spec.inputs) == 1:
                observation = goal_as_vector(observation)
        answer = self._client.act(
            observation,
            deadline_s=self._deadline_s,
            variant=self._variant,
            sampling_seed=None if deterministic else next(self._seeds),
        )
        return answer.actions, state
