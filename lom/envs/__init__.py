"""Two small environments with known optimal modes: `lom/Fork-v0` and `lom/Bandit4-v0`.

Registered on import, as gymnasium's `module:id` form expects (`gymnasium.make("lom.envs:lom/Fork-v0")`), and by the
`gymnasium.envs` entry point, which `lom-train`, `lom-export` and `lom-act` load for every installed package.
"""

from gymnasium.envs.registration import register, registry


def register_envs() -> None:
    """Registers the environments; harmless when called again."""
    for env_id, entry_point, max_episode_steps in (
        ("lom/Fork-v0", "lom.envs.fork:ForkEnv", 50),
        ("lom/Bandit4-v0", "lom.envs.bandit:Bandit4Env", 1),
    ):
        if env_id not in registry:
            register(id=env_id, entry_point=entry_point, max_episode_steps=max_episode_steps)


register_envs()
