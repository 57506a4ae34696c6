"""`lom-serve PATH`: the command line of the server, and of an operator."""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from lom_server.admin_client import COMMANDS, run_command
from lom_server.config import ServerConfig
from lom_server.doctor import run_doctor
from lom_server.errors import StartError
from lom_server.logs import configure_logs
from lom_server.server import RunningServer, serve
from lom_server.settings import SettingsError, read_settings
from lom_server.systemd import notify, watchdog_interval_s

PROGRAM = "lom-serve"
EXIT_REFUSED = 1
EXIT_USAGE = 2

_DESCRIPTION = (
    "Serves policy bundles over gRPC. For a server that runs: lom-serve list | load | unload | promote | rollback. "
    "lom-serve doctor PATH says whether this machine can serve."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves until SIGTERM or SIGINT, then drains and exits with 0; or carries out an operator's command.

    Exits with 2 for a command line that cannot be meant, with 1 for a bundle, port or provider that cannot serve;
    one line on stderr says why.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command = arguments[0] if arguments else ""
    if command in COMMANDS:
        sys.exit(run_command(command, arguments[1:], PROGRAM))
    try:
        settings = read_settings(
            arguments[command == "doctor" :], os.environ, program=PROGRAM, description=_DESCRIPTION
        )
    except SettingsError as error:
        sys.exit(_refusal(str(error), EXIT_USAGE))
    if settings.print_config:
        print(settings.to_toml(), end="")
        return
    if command == "doctor":
        sys.exit(run_doctor(settings.config))
    if find_spec("onnxruntime") is None:
        sys.exit(_refusal("onnxruntime is missing: pip install 'lom[server]'", EXIT_REFUSED))
    configure_logs(settings.config.log_format, settings.config.log_level)
    try:
        was_clean = asyncio.run(_serve_until_signalled(settings.config))
    except StartError as error:
        sys.exit(_refusal(str(error), EXIT_REFUSED))
    sys.exit(0 if was_clean else EXIT_REFUSED)


async def _serve_until_signalled(config: ServerConfig) -> bool:
    is_stopping = asyncio.Event()
    starting = asyncio.current_task()

    def on_signal(number: int) -> None:
        if is_stopping.is_set():
            os._exit(128 + number)
        is_stopping.set()
        if starting is not None:
            starting.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    # Whoever rotates tokens during the start must not end the server: it reads them after this line anyway.
    loop.add_signal_handler(signal.SIGHUP, lambda: None)
    try:
        async with serve(config) as server:
            starting = None
            loop.add_signal_handler(signal.SIGHUP, lambda: loop.create_task(server.reload_tokens()))
            print(_serving_line(server), flush=True)
            notify("READY=1")
            watchdog = asyncio.create_task(_feed_watchdog())
            await is_stopping.wait()
            notify("STOPPING=1")
            watchdog.cancel()
            return await server.stop()
    except asyncio.CancelledError:
        return True  # told to stop before it served: nothing had been accepted


async def _feed_watchdog() -> None:
    interval_s = watchdog_interval_s()
    while interval_s is not None:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval_s / 2)


def _serving_line(server: RunningServer) -> str:
    policies = [
        f"{name}/{published.default_version}:{published.versions[published.default_version].proof.digest[:12]}"
        for name, published in sorted(server.supervisor.published.items())
    ]
    providers = {
        version.proof.provider
        for published in server.supervisor.published.values()
        for version in published.versions.values()
    }
    extra = "".join(
        f" {name}={address}"
        for name, address in (("admin", server.admin_address), ("metrics", server.metrics_address))
        if address
    )
    return (
        f"{PROGRAM}: SERVING policies={','.join(policies)} provider={','.join(sorted(providers))}{extra} "
        f"address={server.address}"
    )


def _refusal(text: str, exit_code: int) -> int:
    print(f"{PROGRAM}: {text}", file=sys.stderr, flush=True)
    return exit_code


if __name__ == "__main__":
    main()
