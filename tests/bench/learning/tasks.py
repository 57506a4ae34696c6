"""What is learned from: datasets that are generated, rolled out or given, each with its environment and its scale."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lom.dataset import Transitions, load_transitions
from lom.envs.bandit import bandit_demonstrations
from lom.envs.double_circle import double_circle_demonstrations
from lom.envs.fetch4 import Kind, fetch4_demonstrations
from lom.envs.fork import fork_demonstrations
from lom.evaluation import env_spaces
from tests.bench.learning.rollouts import RANDOM, Mixing, roll_out

DATA_VARIABLE = "LOM_BENCH_DATA"
CACHE = Path("build/bench/data")

Arrays = Mapping[str, NDArray[Any]]
Group = Literal["generated", "like", "mix"]


class MissingDataError(Exception):
    """A task whose files are not here; the message says where they were expected."""


def given_data() -> Path:
    """The folder with `policies/` and `transitions/`.

    Raises:
        MissingDataError: the environment variable does not name it.
    """
    folder = os.environ.get(DATA_VARIABLE)
    if not folder or not (Path(folder) / "policies").is_dir():
        raise MissingDataError(
            f"expected {DATA_VARIABLE} to name a folder with policies/ and transitions/, got {folder!r}"
        )
    return Path(folder)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Normalised score: 100 · (R - random) / (expert - random)."""

    random: float
    expert: float

    def __call__(self, score: float) -> float:
        return 100.0 * (score - self.random) / (self.expert - self.random)


@dataclass(frozen=True, kw_only=True)
class RollOut:
    """Which given policies a dataset is rolled out from; `RANDOM` and `*` (all of the environment) among them."""

    policies: tuple[str, ...]
    mixing: Mixing = "rows"
    sampled: bool = True

    def names(self, env_name: str, folder: Path) -> list[str]:
        """File names without their suffix."""
        names: list[str] = []
        for name in self.policies:
            if name == "*":
                names += sorted(path.stem for path in folder.glob(f"{env_name}_*.npz"))
            else:
                names.append(name if name == RANDOM else f"{env_name}_{name}")
        return names


@dataclass(frozen=True, kw_only=True)
class Task:
    """A dataset, an environment, a budget.

    Attributes:
        preset: sizes and rates of the networks.
        steps, mixture_steps: gradient steps unless the command says otherwise; 0 takes the preset's.
        curve_episodes, final_episodes: of an evaluation during training and at its end.
        generate: seed -> arrays; every seed is another dataset.
        roll_out: one dataset for all seeds, `rows` long unless the command says otherwise.
        files: one dataset for all seeds, names in `transitions/`.
    """

    name: str
    group: Group
    env: str
    preset: str
    scale: Scale
    steps: int = 0
    mixture_steps: int = 0
    curve_episodes: int = 10
    final_episodes: int = 100
    rows: int = 0
    generate: Callable[[int], Arrays] | None = None
    roll_out: RollOut | None = None
    files: tuple[str, ...] = ()

    def transitions(self, seed: int, rows: int = 0, on_rows: Callable[[int], None] = lambda count: None) -> Transitions:
        """What one seed trains on; made once, then read from `CACHE`.

        Args:
            rows: length of a roll-out; 0 takes the task's.
            on_rows: is told of every new episode of a roll-out.

        Raises:
            MissingDataError: it is to be rolled out or read from files that are not here.
        """
        spaces = env_spaces(self.env)
        if self.files:
            paths = [given_data() / "transitions" / name for name in self.files]
        else:
            paths = [self._cached(seed, rows or self.rows, on_rows)]
        return load_transitions(paths, action_bounds=(spaces.action_low, spaces.action_high))

    def _cached(self, seed: int, rows: int, on_rows: Callable[[int], None]) -> Path:
        seed = seed if self.generate else 0
        path = CACHE / f"{self.name}-{rows or 'all'}-{seed}.npz"
        if path.is_file():
            return path
        if self.generate:
            arrays = self.generate(seed)
        else:
            assert self.roll_out is not None
            folder = given_data() / "policies"
            names = self.roll_out.names(self.env.split(":")[-1].split("-")[0], folder)
            arrays = roll_out(
                self.env,
                names,
                folder,
                rows=rows,
                mixing=self.roll_out.mixing,
                sampled=self.roll_out.sampled,
                seed=seed,
                on_rows=on_rows,
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial.npz")
        np.savez(partial, **arrays)  # type: ignore[arg-type]
        partial.replace(path)
        return path


def _scaled_fork(seed: int) -> Arrays:
    arrays = fork_demonstrations(seed=seed)
    return {**arrays, "rewards": 0.1 * arrays["rewards"]}


# Random: the uniform policy; expert: the better demonstrator without its noise; 100 episodes of the evaluation's seeds.
_FORK = Scale(random=-8.28, expert=3.47)


def _generated() -> list[Task]:
    small: dict[str, Any] = {"group": "generated", "preset": "small"}
    fork: dict[str, Any] = {**small, "env": "lom/Fork-v0", "scale": _FORK}
    return [
        Task(
            name="bandit4",
            env="lom/Bandit4-v0",
            scale=Scale(random=0.0, expert=5.0),
            curve_episodes=1,
            final_episodes=1,
            generate=lambda seed: bandit_demonstrations(seed=seed),
            **small,
        ),
        Task(
            name="double_circle",
            env="lom/DoubleCircle-v0",
            scale=Scale(random=0.5, expert=1.0),
            curve_episodes=100,
            final_episodes=500,
            generate=lambda seed: double_circle_demonstrations(seed=seed),
            **small,
        ),
        Task(name="fork", generate=lambda seed: fork_demonstrations(seed=seed), **fork),
        Task(name="fork_80_20", generate=lambda seed: fork_demonstrations(seed=seed, below_probability=0.2), **fork),
        Task(
            name="fork_no_toll",
            generate=lambda seed: fork_demonstrations(seed=seed, toll=0.0),
            **{**fork, "env": "lom/ForkNoToll-v0", "scale": Scale(random=-5.53, expert=3.47)},
        ),
        Task(name="fork_rewards_x0.1", generate=_scaled_fork, **fork),
        *_fetch4(),
    ]


def _fetch4() -> list[Task]:
    # As for the forks, of 20 episodes.
    kinds: dict[str, tuple[Kind, Scale]] = {
        "reach": ("Reach", Scale(random=1.4, expert=48.0)),
        "push": ("Push", Scale(random=0.0, expert=25.2)),
        "pick": ("PickAndPlace", Scale(random=0.0, expert=29.4)),
    }
    return [
        Task(
            name=f"fetch4_{name}",
            group="generated",
            env=f"lom/Fetch4{kind}-v0",
            preset="small",
            scale=scale,
            mixture_steps=6_000,  # with the preset's 1,500 and 3,000 one seed in five arrives
            steps=12_000,
            final_episodes=50,
            generate=partial(_fetch4_arrays, kind),
        )
        for name, (kind, scale) in kinds.items()
    ]


def _fetch4_arrays(kind: Kind, seed: int) -> Arrays:
    return fetch4_demonstrations(kind, seed=seed)


_LOCOMOTION = {
    # D4RL's scale of returns, as a scale only.
    "HalfCheetah": Scale(random=-280.18, expert=12_135.0),
    "Hopper": Scale(random=-20.27, expert=3_234.3),
    "Walker2d": Scale(random=1.63, expert=4_592.3),
}
_MEDIUM = {"HalfCheetah": "sb3_ppo", "Hopper": "sb3_sac", "Walker2d": "sb3_tqc"}
_EXPERT = {"HalfCheetah": "ythuangyt_sac_2", "Hopper": "ythuangyt_sac_1", "Walker2d": "ythuangyt_sac_5"}
_REPLAY = {
    "HalfCheetah": (RANDOM, "sb3_trpo", "sb3_a2c", "cs285_expert", "sb3_ars", "sb3_ppo"),
    "Hopper": (RANDOM, "sb3_a2c", "sb3_sac"),
    "Walker2d": (RANDOM, "sb3_a2c", "sb3_ars", "ythuangyt_sac_4", "sb3_tqc"),
}
_EXPERT_MIX = {
    "HalfCheetah": ("ythuangyt_sac_2", "sb3_tqc"),
    "Hopper": ("ythuangyt_sac_4", "sb3_ars", "ythuangyt_sac_0", "ythuangyt_sac_1", "cs285_expert"),
    "Walker2d": ("ythuangyt_sac_5", "sb3_trpo", "ythuangyt_sac_0", "cs285_expert"),
}
_SEEDS = tuple(f"ythuangyt_sac_{seed}" for seed in range(6))
_OPOLO = {"HalfCheetah": 6000, "Hopper": 3500, "Walker2d": 3500}


def _locomotion() -> list[Task]:
    tasks = []
    for env, scale in _LOCOMOTION.items():
        recipes = {
            "medium-like": RollOut(policies=(_MEDIUM[env],)),
            "expert-like": RollOut(policies=(_EXPERT[env],)),
            "medium-expert-like": RollOut(policies=(_MEDIUM[env], _EXPERT[env])),
            "medium-replay-like": RollOut(policies=_REPLAY[env]),
            "full-replay-like": RollOut(policies=(RANDOM, "*")),
            "seeds-like": RollOut(policies=_SEEDS, mixing="episodes"),
            "expert-mix-like": RollOut(policies=_EXPERT_MIX[env]),
        }
        common: dict[str, Any] = {
            "env": f"{env}-v4",
            "preset": "locomotion_cpu",
            "scale": scale,
            "steps": 50_000,
            "mixture_steps": 10_000,
            "final_episodes": 20,
        }
        tasks += [
            Task(name=f"{env.lower()}-{kind}", group="like", roll_out=recipe, rows=100_000, **common)
            for kind, recipe in recipes.items()
        ]
        files = (f"opolo_{env}_scores_{_OPOLO[env]}_episodes_10.npz", f"cs285_fall2023_{env}.npz")
        tasks.append(Task(name=f"{env.lower()}-real-mix", group="mix", files=files, **common))
    return tasks


def _fetch() -> list[Task]:
    # Expert: the return of the best policy of the mix; random: what a policy gets that never arrives.
    mixes: dict[str, tuple[str, float, tuple[str, ...]]] = {
        "push": ("FetchPush", -9.6, ("AuroraHashcat_model", "jack-sherman01_model", "jack-sherman01_model_old")),
        "pick": (
            "FetchPickAndPlace",
            -10.4,
            ("AuroraHashcat_model", "jack-sherman01_model", "jack-sherman01_model_old", "schrammlb2_model"),
        ),
        "slide": ("FetchSlide", -31.1, ("AuroraHashcat_model", "jack-sherman01_model", "jack-sherman01_model_old")),
        "reach": ("FetchReach", -4.4, ("jack-sherman01_model", "jack-sherman01_model_old")),
    }
    return [
        Task(
            name=f"fetch-{kind}-mix",
            group="mix",
            env=f"gymnasium_robotics:{env}-v4",
            preset="locomotion_cpu",
            scale=Scale(random=-50.0, expert=expert),
            steps=20_000,
            mixture_steps=5_000,
            final_episodes=50,
            rows=40_000,
            roll_out=RollOut(policies=policies, mixing="episodes", sampled=False),
        )
        for kind, (env, expert, policies) in mixes.items()
    ]


TASKS: dict[str, Task] = {task.name: task for task in (*_generated(), *_locomotion(), *_fetch())}
