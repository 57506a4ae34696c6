"""The whole road in one run: demonstrations → LOM → bundle → server → a client that drives the robot through gRPC.

`make demo` runs it. Every stage is the command that a user would type; it is printed before it runs. What it leaves in
build/demo: the dataset, the run, the bundle (serve it again with `lom-serve build/demo/bundle`), report.png and
report.json.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Circle
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lom.envs.fork import (
    ARENA,
    GOAL,
    GOAL_RADIUS,
    OBSTACLE_RADIUS,
    TOLL_ABOVE_Y,
    fork_demonstrations,
)
from lom_client import PolicyClient
from lom_client.episodes import EpisodeReport, play_episodes

ENV_ID = "lom/Fork-v0"
TITLES = {"bc": "behaviour cloning", "actor": "LOM actor", "greedy_mode": "LOM greedy_mode"}
EVALUATION_SEED = 500_000

console = Console(highlight=False)


class RouteRecorder(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Remembers where every episode went and how it ended."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self.routes: list[list[NDArray[np.float32]]] = []
        self.better: list[bool] = []

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = super().reset(**options)
        self.routes.append([observation])
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        self.routes[-1].append(observation)
        if terminated or truncated:
            self.better.append(bool(info["is_success"] and info["better_route"]))
        return observation, reward, terminated, truncated, info


@dataclass(frozen=True)
class Played:
    """One variant's episodes, all of them answered by the server."""

    report: EpisodeReport
    routes: list[list[NDArray[np.float32]]]
    better_share: float


def main() -> None:
    """Runs the demo and prints its table; a failing stage ends it with that stage's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="replaced if it is there")
    parser.add_argument("--episodes", type=int, default=100, help="per variant, each driven through gRPC")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out: Path = arguments.out
    started = time.monotonic()

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    demonstrations = fork_demonstrations(seed=arguments.seed)
    np.savez(out / "fork.npz", **demonstrations)  # type: ignore[arg-type]
    run, bundle = str(out / "run"), str(out / "bundle")
    seed = str(arguments.seed)
    stage("lom-train", str(out / "fork.npz"), "--env", ENV_ID, "--out", run, "--preset", "small", "--seed", seed)
    stage("lom-export", run, "--out", bundle, "--env", ENV_ID, "--with-bc")
    with served(bundle) as target, PolicyClient(target) as client:
        played = {variant: play(client, variant, arguments.episodes) for variant in TITLES}
        plane, modes = chosen_modes(client)

    print_table(played)
    draw_report(out / "report.png", demonstrations, played, plane, modes, training_curves(out / "run" / "tensorboard"))
    (out / "report.json").write_text(json.dumps(summary(played), indent=2) + "\n")
    console.print(f"[bold]{out / 'report.png'}[/] shows it. {time.monotonic() - started:.0f} s in all. Serve it again:")
    console.print(f"  lom-serve {bundle}\n  lom-act --env {ENV_ID}")


def command(name: str) -> str:
    """The installed program beside this interpreter."""
    return str(Path(sysconfig.get_path("scripts")) / name)


def stage(name: str, *arguments: str) -> None:
    """Runs one command of the road, in plain sight."""
    console.print(f"\n[bold]$ {name} {' '.join(arguments)}[/]", soft_wrap=True)
    finished = subprocess.run([command(name), *arguments], check=False)
    if finished.returncode != 0:
        sys.exit(finished.returncode)


@contextmanager
def served(bundle: str) -> Iterator[str]:
    """A server on a free port, waited for until it is SERVING and stopped afterwards."""
    console.print(f"\n[bold]$ lom-serve {bundle} --listen 127.0.0.1:0[/]")
    program = [command("lom-serve"), bundle, "--listen", "127.0.0.1:0"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if "address=" not in line:
                sys.exit(server.wait())
            console.print(line.strip(), soft_wrap=True)
            yield f"grpc://{line.rsplit('address=', 1)[1].strip()}"
        finally:
            server.send_signal(signal.SIGTERM)


def play(client: PolicyClient, variant: str, episodes: int) -> Played:
    """Drives the fork with one variant, one query a step."""
    env = RouteRecorder(gymnasium.make(f"lom.envs:{ENV_ID}"))
    report = play_episodes(env, client, episodes=episodes, seed=EVALUATION_SEED, variant=variant)
    return Played(report=report, routes=env.routes, better_share=float(np.mean(env.better)))


def chosen_modes(client: PolicyClient) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """The mode that the server chooses at every point of a grid: float32[N], int32[N, N] (rows are y)."""
    plane = np.linspace(-ARENA, ARENA, 121, dtype=np.float32)
    points = np.stack(np.meshgrid(plane, plane), axis=-1).reshape(-1, 2)
    answers = [client.act(part, deadline_s=5.0, variant="greedy_mode").mode for part in np.array_split(points, 20)]
    modes = np.concatenate([answer for answer in answers if answer is not None])
    return plane, modes.reshape(len(plane), len(plane))


def summary(played: dict[str, Played]) -> dict[str, dict[str, float]]:
    """The table as numbers; latencies in microseconds."""
    return {
        variant: {
            "return_mean": float(np.mean(result.report.returns)),
            "success_rate": float(result.report.success_rate or 0.0),
            "better_route_share": result.better_share,
            "latency_p50_us": float(np.percentile(result.report.latencies_s, 50) * 1e6),
            "latency_p99_us": float(np.percentile(result.report.latencies_s, 99) * 1e6),
        }
        for variant, result in played.items()
    }


def print_table(played: dict[str, Played]) -> None:
    """Behaviour cloning beside the two ways in which LOM acts."""
    episodes = len(next(iter(played.values())).report.returns)
    table = Table(title=f"{ENV_ID}, {episodes} episodes each, every action over gRPC", title_justify="left")
    for heading in ("policy", "return", "success", "better route", "answer p50", "p99"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for variant, numbers in summary(played).items():
        table.add_row(
            TITLES[variant],
            f"{numbers['return_mean']:.2f}",
            f"{numbers['success_rate']:.2f}",
            f"{numbers['better_route_share']:.2f}",
            f"{numbers['latency_p50_us']:.0f} µs",
            f"{numbers['latency_p99_us']:.0f} µs",
        )
    console.print(table)


def training_curves(folder: Path) -> dict[str, NDArray[np.float64]]:
    """Curves by name, float64[K, 2] (step, value)."""
    events = EventAccumulator(str(folder))
    events.Reload()
    names = ("mixture/nll", "critic/loss", "hyper_critic/loss", "actor/loss")
    return {name: np.array([(event.step, event.value) for event in events.Scalars(name)]) for name in names}


def draw_report(
    path: Path,
    demonstrations: dict[str, NDArray[Any]],
    played: dict[str, Played],
    plane: NDArray[np.float32],
    modes: NDArray[np.int32],
    curves: dict[str, NDArray[np.float64]],
) -> None:
    """Routes of the demonstrators and of every variant, the chosen mode over the plane, and the training curves."""
    figure, axes = plt.subplots(2, 3, figsize=(13.5, 8.4), layout="constrained")
    figure.suptitle("Two good ways round an obstacle: cloning takes their mean, LOM takes the better one", fontsize=14)

    ends = np.flatnonzero(demonstrations["terminals"] | demonstrations["timeouts"]) + 1
    shown = [part[:, :2] for part in np.split(demonstrations["next_observations"], ends)[:60] if len(part)]
    draw_plane(axes[0, 0], "demonstrators")
    draw_routes(axes[0, 0], shown, "tab:grey")
    for axis, (variant, result), colour in zip(
        (axes[0, 1], axes[0, 2], axes[1, 0]), played.items(), ("tab:red", "tab:blue", "tab:green"), strict=True
    ):
        numbers = summary({variant: result})[variant]
        success, returned = numbers["success_rate"], numbers["return_mean"]
        draw_plane(axis, f"{TITLES[variant]}: success {success:.2f}, return {returned:.2f}")
        draw_routes(axis, [np.array(route) for route in result.routes], colour)

    axis = axes[1, 1]
    present = np.unique(modes)
    compact = np.searchsorted(present, modes)
    colours = matplotlib.colormaps["Pastel1"].resampled(max(len(present), 2))
    axis.pcolormesh(plane, plane, compact, cmap=colours, shading="nearest", rasterized=True)
    draw_plane(axis, "mode chosen by hyper-Q, and where the data is")
    data = demonstrations["observations"]
    axis.plot(data[:, 0], data[:, 1], ",", color="black", alpha=0.35)
    for index, mode in enumerate(present):
        axis.plot([], [], "s", color=colours(index), label=f"component {mode}")
    axis.legend(loc="lower right", fontsize=7)

    draw_curves(axes[1, 2], curves)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_curves(axis: Axes, curves: dict[str, NDArray[np.float64]]) -> None:
    """Losses, averaged over nine logged points; the likelihood can be negative, so it has an axis of its own."""
    likelihood = axis.twinx()
    for name, curve in curves.items():
        smooth = np.convolve(curve[:, 1], np.ones(9) / 9, mode="valid")
        is_likelihood = name == "mixture/nll"
        target = likelihood if is_likelihood else axis
        target.plot(curve[4:-4, 0], smooth, label=name, linewidth=1.2, color="tab:purple" if is_likelihood else None)
    axis.set(title="training", xlabel="gradient step", ylabel="loss", yscale="log")
    likelihood.set_ylabel("mixture/nll (nat)", color="tab:purple")
    axis.legend(fontsize=8, loc="upper right")


def draw_plane(axis: Axes, title: str) -> None:
    """Obstacle, goal and toll zone."""
    axis.axhspan(TOLL_ABOVE_Y, ARENA, color="tab:orange", alpha=0.08, zorder=0)
    axis.text(-1.35, 1.15, "toll", color="tab:orange", fontsize=9)
    axis.add_patch(Circle((0, 0), OBSTACLE_RADIUS, color="black", alpha=0.7))
    axis.add_patch(Circle((float(GOAL[0]), float(GOAL[1])), GOAL_RADIUS, color="gold"))
    axis.set(title=title, xlim=(-ARENA, ARENA), ylim=(-ARENA, ARENA), aspect="equal", xticks=[], yticks=[])


def draw_routes(axis: Axes, routes: list[NDArray[Any]], colour: str) -> None:
    """One thin line an episode."""
    for route in routes:
        axis.plot(route[:, 0], route[:, 1], color=colour, alpha=0.35, linewidth=0.8)


if __name__ == "__main__":
    main()
