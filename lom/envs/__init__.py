"""Environments with known optimal modes: forks, a bandit, the double circle, a robot arm with four targets.

Registered on import, as gymnasium's `module:id` form expects (`gymnasium.make("lom.envs:lom/Fork-v0")`), and by the
`gymnasium.envs` entry point, which `lom-train`, `lom-export` and `lom-act` load for every installed package.
"""

from typing import Any

from gymnasium.envs.registration import register, registry

_ENVS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "lom/Fork-v0": ("lom.envs.fork:ForkEnv", 50, {}),
    "lom/ForkNoToll-v0": ("lom.envs.fork:ForkEnv", 50, {"toll": 0.0}),
    "lom/Bandit4-v0": ("lom.envs.bandit:Bandit4Env", 1, {}),
    "lom/DoubleCircle-v0": ("lom.envs.double_circle:DoubleCircleEnv", 1, {}),
    "lom/Fetch4Reach-v0": ("lom.envs.fetch4:Fetch4Env", 50, {"kind": "Reach"}),
    "lom/Fetch4Push-v0": ("lom.envs.fetch4:Fetch4Env", 50, {"kind": "Push"}),
    "lom/Fetch4PickAndPlace-v0": ("lom.envs.fetch4:Fetch4Env", 50, {"kind": "PickAndPlace"}),
}


def register_envs() -> None:
    """Registers the environments; harmless when called again."""
    for env_id, (entry_point, max_episode_steps, arguments) in _ENVS.items():
        if env_id not in registry:
            register(id=env_id, entry_point=entry_point, max_episode_steps=max_episode_steps, kwargs=arguments)


register_envs()
