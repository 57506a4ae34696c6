"""One serving process: an event loop with everything between a socket and a graph. Does what its supervisor says."""

import asyncio
import logging
import os
import signal
import sys
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from lom_api.reasons import Reason
from lom_server.batcher import MicroBatcher
from lom_server.config import ServerConfig
from lom_server.control import HUNG, Command, CommandLoop, Facts
from lom_server.edges import oip_schema, policy_edge
from lom_server.edges.authentication import Authenticator, server_credentials
from lom_server.edges.listener import Listener, ListenerLimits
from lom_server.edges.open_inference import OpenInferenceEdge
from lom_server.edges.policy_edge import PolicyEdge
from lom_server.engine import OnnxEngine
from lom_server.errors import StartError, log_incident
from lom_server.loading import LoadedPolicy, load_policy
from lom_server.logs import LogHandler, configure_logs
from lom_server.metrics import RequestMetrics
from lom_server.recording import TrafficRecorder
from lom_server.run_watch import RunWatch
from lom_server.service import Observer, PolicyService, PolicyVersions

if TYPE_CHECKING:
    from lom_server.tracing import Tracer

EXIT_REFUSED = 1
_SWITCH_INTERVAL_S = 0.0005

_logger = logging.getLogger(__name__)

_Key: TypeAlias = "tuple[str, int, str]"


class Worker:
    """Loads, publishes and answers.

    Every method named like a command takes and returns the facts that travel between supervisor and worker.

    Threads: belongs to one event loop.
    """

    def __init__(self, config: ServerConfig, logs: LogHandler, on_hung: Callable[[], None]) -> None:
        """`on_hung` is called in a thread of its own, when a run was stopped.

        Raises:
            StartError: tokens, certificates or the folder of recordings are not usable.
        """
        self._config = config
        self._logs = logs
        self._loaded: dict[_Key, LoadedPolicy] = {}
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lom-loader")
        self._batcher = MicroBatcher(max_batch_rows=config.max_batch_rows, max_queue_rows=config.max_queue_rows)
        self._metrics = RequestMetrics()
        self._tracer = _tracer() if config.traces else None
        observer: Observer = self._metrics if self._tracer is None else self._tracer.observing(self._metrics)
        self._recorder = None
        if config.record is not None:
            self._recorder = TrafficRecorder(config.record, max_mb=config.record_max_mb, workers=config.workers)
            observer = self._recorder.observing(observer)
        self._service = PolicyService(batcher=self._batcher, observer=observer)
        self._authenticator = None if config.tokens is None else Authenticator(config.tokens)
        self._listener = Listener(
            ListenerLimits.of(config),
            authenticator=self._authenticator,
            credentials=server_credentials(config),
            observe_refusal=lambda reason: self._metrics.refused("", reason),
            tracer=self._tracer,
        )
        PolicyEdge(self._service).register(self._listener)
        OpenInferenceEdge(
            self._service,
            server_version=metadata.version("lom"),
            max_parameters=config.max_parameters,
            statistics=self._metrics,
        ).register(self._listener)
        if config.reflection:
            self._listener.add_reflection([policy_edge.SERVICE, oip_schema.SERVICE])
        # Also those that were let go of: their last run may be the one that hangs.
        self._engines: list[weakref.ref[OnnxEngine]] = []
        self._watch = RunWatch(self._watched_engines, config.run_limit_s, on_hung)

    @property
    def commands(self) -> dict[str, Command]:
        """What a supervisor may ask, by name."""
        return {
            "listen": self.listen,
            "load": self.load,
            "forget": self.forget,
            "publish": self.publish,
            "withdraw": self.withdraw,
            "announce": self.announce,
            "measure": self.measure,
            "reload_tokens": self.reload_tokens,
            "drain": self.drain,
        }

    async def listen(self, facts: Facts) -> Facts:
        """Listens on `address`, sharing its port with other workers where `share_port`; answers the `address` got."""
        return {"address": await self._listener.listen(facts["address"], share_port=facts["share_port"])}

    async def load(self, facts: Facts) -> Facts:
        """Makes the bundle at `path`, proved to have `digest` and `costs`, ready to be published."""
        key = _key(facts)
        if key not in self._loaded:
            costs = {
                graph: {int(rows): run_ns for rows, run_ns in sizes.items()} for graph, sizes in facts["costs"].items()
            }
            name, version, digest = key
            loaded = await asyncio.get_running_loop().run_in_executor(
                self._loader,
                lambda: load_policy(name, version, Path(facts["path"]), self._config, digest=digest, costs=costs),
            )
            self._loaded[key] = loaded
            alive = [known for known in self._engines if known() is not None]
            self._engines = [*alive, weakref.ref(loaded.engine)]  # replaced, never changed: a thread reads it
        return {}

    async def forget(self, facts: Facts) -> Facts:
        """Lets go of a loaded bundle that is not to be published after all."""
        self._loaded.pop(_key(facts), None)
        return {}

    async def publish(self, facts: Facts) -> Facts:
        """Serves, of `policy`, the loaded `versions` (number -> digest) and no others, `default_version` by default."""
        name = facts["policy"]
        keys: set[_Key] = {(name, int(version), digest) for version, digest in facts["versions"].items()}
        policy = PolicyVersions(
            versions={key[1]: self._loaded[key].policy for key in keys}, default_version=facts["default_version"]
        )
        if self._recorder is not None:
            self._recorder.publish(policy)
        self._service.publish(name, policy)
        self._metrics.publish(name, self._service.policies[name])
        for key in [key for key in self._loaded if key[0] == name and key not in keys]:
            del self._loaded[key]
        await self._listener.set_serving(name, True)
        return {}

    async def withdraw(self, facts: Facts) -> Facts:
        """Serves `policy` no longer; `reason` says why, where it belongs here all the same."""
        name, reason = facts["policy"], facts["reason"]
        self._service.withdraw(name, None if reason is None else Reason(reason))
        self._metrics.withdraw(name)
        for key in [key for key in self._loaded if key[0] == name]:
            del self._loaded[key]
        await self._listener.set_serving(name, False)
        return {}

    async def announce(self, facts: Facts) -> Facts:
        """Tells health checks that the server as a whole is SERVING, or is not."""
        await self._listener.set_serving("", facts["is_serving"])
        return {}

    async def measure(self, _: Facts) -> Facts:
        """What was counted so far."""
        snapshot = self._metrics.snapshot(
            queue_rows=self._batcher.waiting_rows,
            streams=self._listener.open_streams,
            dropped_log_lines=self._logs.dropped_lines,
            recorded=0 if self._recorder is None else self._recorder.recorded,
            unrecorded=0 if self._recorder is None else self._recorder.dropped,
        )
        return {"metrics": snapshot}

    async def reload_tokens(self, _: Facts) -> Facts:
        """Reads the file of tokens again."""
        if self._authenticator is not None:
            self._authenticator.reload()
        return {}

    async def drain(self, _: Facts) -> Facts:
        """Stops: NOT_SERVING, no new requests, accepted ones finish within the grace time."""
        self._service.drain()
        return {"was_clean": await self._listener.drain(self._config.grace_s)}

    def close(self) -> None:
        """Exports the spans and writes the recording that are left. Blocks."""
        if self._recorder is not None:
            self._recorder.close()
        if self._tracer is not None:
            self._tracer.close()

    def _watched_engines(self) -> Iterable[OnnxEngine]:
        return [engine for known in self._engines if (engine := known()) is not None]


def _tracer() -> "Tracer":
    from lom_server.tracing import create_tracer  # here: OpenTelemetry is installed where traces are wanted

    return create_tracer()


def _key(facts: Facts) -> _Key:
    return facts["policy"], facts["version"], facts["digest"]


def main() -> None:
    """Serves by the configuration in its first argument, until the supervisor says otherwise or is gone."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # a terminal and a service manager signal the whole group
    # The engine thread asks for the GIL before and after every run, of a loop that may be busy refusing: by default
    # it would wait 5 ms each time.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    config = ServerConfig.from_json(sys.argv[1])
    asyncio.run(_serve(config, configure_logs(config.log_format, config.log_level)))


async def _serve(config: ServerConfig, logs: LogHandler) -> None:
    """Does not return: a load, a run or a caller that is left must not keep the process, and with it the port."""
    supervisor = CommandLoop()
    status = EXIT_REFUSED
    try:
        worker = Worker(config, logs, on_hung=lambda: supervisor.tell(HUNG))
        await supervisor.run(worker.commands)
        worker.close()
        status = 0
    except StartError as error:
        _logger.error("not started: %s", error)
    except Exception as error:
        log_incident("the supervisor cannot be understood", error)
    finally:
        logging.shutdown()
        os._exit(status)


if __name__ == "__main__":
    main()
