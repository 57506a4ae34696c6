"""`lom-serve BUNDLE`: the command line of the server."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from lom_bundle import BundleError
from lom_server.config import ServerConfig
from lom_server.errors import StartError
from lom_server.lifecycle import RunningServer, serve

PROGRAM = "lom-serve"
EXIT_REFUSED = 1
EXIT_USAGE = 2


@dataclass(frozen=True, kw_only=True)
class _CommandLine(ServerConfig):
    bundle: tyro.conf.Positional[Path]
    """Folder of the bundle to serve."""

    def __post_init__(self) -> None:
        """Leaves the check to `ServerConfig`, whose refusal fits on one line."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves until SIGTERM or SIGINT, then drains and exits with 0.

    Exits with 2 for a command line that cannot be meant, with 1 for a bundle, port or provider that cannot serve;
    one line on stderr says why.
    """
    _log_to_stderr()
    chosen = tyro.cli(
        _CommandLine,
        prog=PROGRAM,
        description="Serves a policy bundle over gRPC.",
        args=arguments,
        config=(tyro.conf.UseAppendAction,),  # one value per option: no list that a shell left empty, trusting everyone
    )
    try:
        config = ServerConfig(**vars(chosen))
    except ValueError as error:
        sys.exit(_refusal(str(error), EXIT_USAGE))
    try:
        asyncio.run(_serve_until_signalled(config))
    except (BundleError, StartError) as error:
        sys.exit(_refusal(str(error), EXIT_REFUSED))


async def _serve_until_signalled(config: ServerConfig) -> None:
    is_stopping = asyncio.Event()

    def on_signal(number: int) -> None:
        if is_stopping.is_set():
            os._exit(128 + number)
        is_stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    async with serve(config) as server:
        print(_serving_line(server), flush=True)
        await is_stopping.wait()


def _serving_line(server: RunningServer) -> str:
    policy = server.policy
    return (
        f"{PROGRAM}: SERVING policy={policy.manifest.policy} bundle={policy.bundle_digest[:12]} "
        f"provider={policy.provider} variants={','.join(sorted(policy.lanes))} "
        f"default={policy.manifest.default_variant} address={server.address}"
    )


def _refusal(text: str, exit_code: int) -> int:
    print(f"{PROGRAM}: {text}", file=sys.stderr, flush=True)
    return exit_code


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("lom_server")
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False


if __name__ == "__main__":
    main()
