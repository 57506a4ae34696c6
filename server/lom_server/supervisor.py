"""What a server serves, over all of its workers: loaded, promoted, rolled back, unloaded.

Runs no graph and answers no robot. A bundle reaches the workers only after a verifier has proved it. A change is
prepared in all of them before any of them serves it, and acknowledged when all of them do.
"""

import asyncio
import logging
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path

from lom_api.reasons import Reason
from lom_server.config import ServerConfig, is_unix
from lom_server.control import ControlError, Facts
from lom_server.errors import PolicyError, StartError, quoted
from lom_server.proof import Proof, prove
from lom_server.repository import open_repository
from lom_server.worker_pool import WorkerPool, WorkerProcess

_logger = logging.getLogger(__name__)

_NOT_THE_BUNDLES_FAULT = (Reason.WORKER_LOST, Reason.WARMUP_TIMEOUT, Reason.INTERNAL_ERROR)


@dataclass(frozen=True, kw_only=True)
class Version:
    """A proved bundle that every worker holds."""

    path: Path
    proof: Proof


@dataclass(frozen=True, kw_only=True)
class Published:
    """What is served under one name; `previous_version` is 0 where nothing was promoted before."""

    versions: Mapping[int, Version]
    default_version: int
    previous_version: int = 0

    @property
    def default(self) -> Version:
        """What answers requests without a version."""
        return self.versions[self.default_version]


class LoadState(StrEnum):
    """Where a version of the repository stands."""

    ON_DISK = "ON_DISK"
    LOADING = "LOADING"
    READY = "READY"
    FAILED = "FAILED"


@dataclass(frozen=True, kw_only=True)
class VersionState:
    """One version; `reason` of its last failed load and `digest` of what is loaded, where there is any."""

    version: int
    state: LoadState
    reason: str = ""
    digest: str = ""


@dataclass(frozen=True, kw_only=True)
class PolicyState:
    """One policy, as an operator sees it; versions in order.

    Attributes:
        survives_restart: a server that started now would have the same default version.
    """

    policy: str
    default_version: int
    previous_version: int
    survives_restart: bool
    versions: tuple[VersionState, ...]


class Supervisor:
    """A server: its workers and what they serve.

    Threads: belongs to one event loop.
    """

    def __init__(self, config: ServerConfig) -> None:
        """Does nothing yet.

        Raises:
            StartError: there is neither a bundle nor a repository at `config.models`.
        """
        self._config = config
        self._repository = open_repository(config.models)
        self._published: dict[str, Published] = {}
        self._missing: dict[str, Reason] = {}
        self._loading: dict[str, int] = {}
        self._failures: dict[tuple[str, int], ControlError] = {}
        self._reserved: socket.socket | None = None
        self._is_serving = False
        # Held by whoever changes what workers hold: a load, a swap, the bringing up of a new worker.
        self._change = asyncio.Lock()
        self.pool = WorkerPool(config, self._bring_up)
        self.address = ""

    @property
    def published(self) -> Mapping[str, Published]:
        """What is served, by policy."""
        return self._published

    async def start(self) -> None:
        """Returns when the server is SERVING what was asked for.

        A policy of a repository that does not load is logged and left out; the others serve.

        Raises:
            StartError: the address is taken, a worker does not start, or not one policy could be loaded.
        """
        self._reserve_port()
        wanted = self._wanted_at_start()
        self._missing = dict.fromkeys(wanted, Reason.MODEL_LOADING)
        try:
            await self.pool.start()
            for policy, versions in wanted.items():
                await self._load_at_start(policy, versions)
            failures = list(self._failures.items())
            first_failure = None if self._published else failures.pop(0)[1]
            for (policy, version), failure in failures:
                _logger.error("not loaded: %s/%d: %s", policy, version, failure)
            if first_failure is not None:
                raise first_failure
        except ControlError as error:
            await self.stop()
            raise StartError(error.reason, error.detail) from None
        async with self._change:
            self._is_serving = True
            await self.pool.tell_all("announce", is_serving=True)

    async def stop(self) -> bool:
        """Drains. Returns whether every accepted request was answered within the grace time."""
        was_clean = await self.pool.stop()
        if self._reserved is not None:
            self._reserved.close()
        return was_clean

    def list_policies(self) -> list[PolicyState]:
        """Everything on disk and everything loaded, by name.

        Raises:
            PolicyError: STORE_UNREADABLE.
        """
        on_disk = self._scan()
        return [self._state_of(policy, on_disk) for policy in sorted({*on_disk, *self._published})]

    async def load(self, policy: str, version: int = 0, *, promote: bool = False) -> PolicyState:
        """Proves a version of the repository and loads it; a version that is loaded already is replaced if it changed.

        The first version of a policy becomes its default; a later one where `promote`.

        Args:
            version: 0 for the highest on disk.

        Raises:
            PolicyError: BUNDLE_NOT_FOUND, RELOAD_IN_PROGRESS, or why the bundle must not be served; then everything
                is as it was.
        """
        version, path = self._place_of(policy, version)
        with self._loading_mark(policy, version):
            try:
                await self._prove_and_load(policy, version, path, promote=promote)
            except ControlError as error:
                _logger.warning("not loaded: %s/%d: %s", policy, version, error)
                raise _as_policy_error(error) from None
        return self._state_now(policy)

    async def unload(self, policy: str, version: int = 0, *, force: bool = False) -> PolicyState:
        """Lets a version go, or all of them; requests that it accepted are finished.

        Args:
            force: also where it is the default one.

        Raises:
            PolicyError: MODEL_NOT_FOUND, VERSION_NOT_FOUND; LAST_VERSION, where requests without a version would find
                another policy than before, or none.
        """
        async with self._change:
            published = self._loaded(policy)
            if version:
                _check_loaded(published, version)
            left = {} if version == 0 else {n: kept for n, kept in published.versions.items() if n != version}
            if published.default_version not in left and not force:
                raise PolicyError(
                    Reason.LAST_VERSION,
                    f"version {published.default_version} of {quoted(policy)} answers requests: "
                    "expected another one to be promoted first, or force",
                )
            if left:
                await self._publish(policy, _only(published, left))
            else:
                await self._withdraw(policy)
        return self._state_now(policy)

    async def promote(self, policy: str, version: int) -> PolicyState:
        """Makes a loaded version the default.

        Raises:
            PolicyError: MODEL_NOT_FOUND, VERSION_NOT_FOUND.
        """
        async with self._change:
            published = self._loaded(policy)
            _check_loaded(published, version)
            await self._promote(policy, published, version)
        return self._state_now(policy)

    async def roll_back(self, policy: str) -> PolicyState:
        """Promotes the version that was the default before the last promotion.

        Raises:
            PolicyError: MODEL_NOT_FOUND; NO_PREVIOUS_VERSION.
        """
        async with self._change:
            published = self._loaded(policy)
            if not published.previous_version:
                raise PolicyError(
                    Reason.NO_PREVIOUS_VERSION, f"policy {quoted(policy)}: expected an earlier promotion, got none"
                )
            await self._promote(policy, published, published.previous_version)
        return self._state_now(policy)

    async def reload_tokens(self) -> None:
        """Has every worker read the file of tokens again."""
        await self.pool.tell_all("reload_tokens")

    def _reserve_port(self) -> None:
        """Takes the port alone, then shares it with the workers: gRPC would share it with strangers too, in silence."""
        if is_unix(self._config.listen):
            return
        host, port = self._config.host_and_port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            if port:
                socket.create_server((host, port), family=family).close()
            self._reserved = socket.socket(family)
            self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            self._reserved.bind((host, port))
        except OSError as error:
            raise StartError(
                "ADDRESS_UNAVAILABLE",
                f"could not listen on {self._config.listen}; expected a free port of this machine",
            ) from error

    def _wanted_at_start(self) -> dict[str, dict[int, Path]]:
        """The bundles to load by policy and version, the one to be the default first."""
        on_disk = self._repository.scan()
        if not on_disk:
            raise StartError("BUNDLE_NOT_FOUND", "expected at least one POLICY/VERSION/ with a bundle, found none")
        for policy, version in self._config.pinned_versions.items():
            if version not in on_disk.get(policy, {}):
                raise StartError(
                    "BUNDLE_NOT_FOUND", f"pin: expected a version of the repository, got {policy}={version}"
                )
        wanted = {}
        for policy, versions in on_disk.items():
            default = self._default_at_start(policy, versions)
            others = [version for version in versions if version != default] if self._config.versions == "all" else []
            wanted[policy] = {version: versions[version] for version in (default, *reversed(others))}
        return wanted

    def _default_at_start(self, policy: str, versions: Mapping[int, Path]) -> int:
        """The one that is pinned, or else was promoted last, or else is the newest of `versions`."""
        chosen = self._config.pinned_versions.get(policy) or self._repository.promoted_version(policy)
        if chosen in (None, *versions):
            return chosen or max(versions)
        _logger.error("%s: version %s was promoted but is not there: %d is the newest", policy, chosen, max(versions))
        return max(versions)

    async def _load_at_start(self, policy: str, versions: Mapping[int, Path]) -> None:
        for version, path in versions.items():
            try:
                await self._prove_and_load(policy, version, path)
            except ControlError:  # kept in `_failures`
                continue

    async def _bring_up(self, worker: WorkerProcess) -> None:
        """Makes a new worker hold and serve what the others do, before anybody can reach it."""
        ask = partial(worker.ask, limit_s=self._config.load_limit_s)
        async with self._change:
            for policy, published in list(self._published.items()):
                lost = {}
                for number, version in published.versions.items():
                    try:
                        await ask("load", **_load_facts(policy, number, version))
                    except ControlError as error:
                        if error.reason in _NOT_THE_BUNDLES_FAULT:
                            raise
                        _logger.error("no longer there: %s/%d: %s", policy, number, error)
                        lost[number] = error
                await self._let_go_of(policy, lost)
            for policy, reason in self._missing.items():
                await ask("withdraw", policy=policy, reason=reason)
            for policy, published in self._published.items():
                await ask("publish", **_publish_facts(policy, published))
            answer = await ask("listen", address=self._listen_address(), share_port=self._reserved is not None)
            self.address = answer["address"]
            await ask("announce", is_serving=self._is_serving)

    async def _let_go_of(self, policy: str, lost: Mapping[int, ControlError]) -> None:
        """Workers must agree: what a new one cannot load any more, because somebody changed or removed it, all let go.

        Except for a default version that others still serve: they go on, and the new worker has to wait.
        """
        if not lost:
            return
        published = self._published[policy]
        left = {number: version for number, version in published.versions.items() if number not in lost}
        if published.default_version in left:
            await self._publish(policy, _only(published, left))
        elif self.pool.is_alive:
            raise lost[published.default_version]
        else:
            await self._withdraw(policy, Reason.MODEL_FAILED)

    def _listen_address(self) -> str:
        if self._reserved is None:
            return self._config.listen
        host = self._config.host_and_port[0]
        return f"[{host}]:{self._port()}" if ":" in host else f"{host}:{self._port()}"

    def _port(self) -> int:
        assert self._reserved is not None
        port: int = self._reserved.getsockname()[1]
        return port

    @contextmanager
    def _loading_mark(self, policy: str, version: int) -> Iterator[None]:
        if policy in self._loading:
            raise PolicyError(
                Reason.RELOAD_IN_PROGRESS,
                f"policy {quoted(policy)}: version {self._loading[policy]} is being loaded at this moment",
            )
        self._loading[policy] = version
        try:
            yield
        finally:
            del self._loading[policy]

    async def _prove_and_load(self, policy: str, version: int, path: Path, *, promote: bool = False) -> None:
        # Beside the proof: a worker that does not listen must not hold it up.
        saying_so = asyncio.create_task(self._say_why_missing(policy, Reason.MODEL_LOADING))
        try:
            try:
                proof = await prove(path, self._config, yields=self._is_serving)
            finally:
                await saying_so
            await self._load(policy, version, Version(path=path, proof=proof), promote=promote)
        except ControlError as error:
            self._failures[policy, version] = error
            self.pool.totals.loaded(error.reason)
            await self._say_why_missing(policy, Reason.MODEL_FAILED)
            raise
        self._failures.pop((policy, version), None)
        self.pool.totals.loaded()

    async def _say_why_missing(self, policy: str, reason: Reason) -> None:
        """What callers of `policy` are told as long as nothing is served under that name."""
        async with self._change:
            if policy not in self._published:
                await self._withdraw(policy, reason)

    async def _load(self, policy: str, number: int, version: Version, *, promote: bool) -> None:
        async with self._change:
            facts = _load_facts(policy, number, version)
            try:
                await self.pool.ask_all("load", limit_s=self._config.load_limit_s, **facts)
            except ControlError:
                await self.pool.tell_all("forget", **facts)
                raise
            published = self._published.get(policy)
            if published is None:
                await self._publish(policy, Published(versions={number: version}, default_version=number))
                return
            published = replace(published, versions={**published.versions, number: version})
            if promote and number != published.default_version:
                await self._promote(policy, published, number)
            else:
                await self._publish(policy, published)

    async def _promote(self, policy: str, published: Published, number: int) -> None:
        if not self._repository.promote(policy, number):
            _logger.warning("promotion of %s/%d could not be written: a restart forgets it", policy, number)
        previous = published.default_version
        if number == previous:
            return
        versions = published.versions
        if self._config.versions == "latest":  # what a roll-back needs, and no more
            versions = {kept: version for kept, version in versions.items() if kept in (number, previous)}
        await self._publish(policy, Published(versions=versions, default_version=number, previous_version=previous))

    async def _publish(self, policy: str, published: Published) -> None:
        before = self._published.get(policy)
        self._published[policy] = published
        self._missing.pop(policy, None)
        await self.pool.tell_all("publish", **_publish_facts(policy, published))
        if before is not None and before.default.proof.digest != published.default.proof.digest:
            self.pool.totals.swapped()
        _logger.info(
            "published: %s: %s, before %s",
            policy,
            _default_of(published),
            "nothing" if before is None else _default_of(before),
        )

    async def _withdraw(self, policy: str, reason: Reason | None = None) -> None:
        """Serves `policy` no longer; `reason` says why, where it belongs here all the same."""
        before = self._published.pop(policy, None)
        self._missing.pop(policy, None)
        if reason is not None:
            self._missing[policy] = reason
        await self.pool.tell_all("withdraw", policy=policy, reason=reason)
        if before is not None:
            _logger.info("withdrawn: %s, before %s", policy, _default_of(before))

    def _loaded(self, policy: str) -> Published:
        published = self._published.get(policy)
        if published is None:
            raise PolicyError(Reason.MODEL_NOT_FOUND, f"policy {quoted(policy)} is not loaded")
        return published

    def _place_of(self, policy: str, version: int) -> tuple[int, Path]:
        versions = self._scan().get(policy, {})
        number = version or max(versions, default=0)
        if number not in versions:
            raise PolicyError(
                Reason.BUNDLE_NOT_FOUND, f"the repository has no version {version or 'at all'} of {quoted(policy)}"
            )
        return number, versions[number]

    def _scan(self) -> Mapping[str, Mapping[int, Path]]:
        try:
            return self._repository.scan()
        except StartError as error:
            raise PolicyError(Reason.STORE_UNREADABLE, error.detail) from None

    def _state_now(self, policy: str) -> PolicyState:
        """After an operation, which succeeded whether or not the repository can be read at this moment."""
        try:
            return self._state_of(policy, self._scan())
        except PolicyError:
            return self._state_of(policy, {})

    def _state_of(self, policy: str, on_disk: Mapping[str, Mapping[int, Path]]) -> PolicyState:
        published = self._published.get(policy) or Published(versions={}, default_version=0)
        stored = on_disk.get(policy, {})
        numbers = sorted({*stored, *published.versions})
        return PolicyState(
            policy=policy,
            default_version=published.default_version,
            previous_version=published.previous_version,
            survives_restart=bool(stored) and self._default_at_start(policy, stored) == published.default_version,
            versions=tuple(self._version_state(policy, number, published) for number in numbers),
        )

    def _version_state(self, policy: str, number: int, published: Published) -> VersionState:
        failure = self._failures.get((policy, number))
        reason = "" if failure is None else failure.reason
        loaded = published.versions.get(number)
        if loaded is not None:
            return VersionState(version=number, state=LoadState.READY, reason=reason, digest=loaded.proof.digest)
        if self._loading.get(policy) == number:
            return VersionState(version=number, state=LoadState.LOADING)
        state = LoadState.ON_DISK if failure is None else LoadState.FAILED
        return VersionState(version=number, state=state, reason=reason)


def _load_facts(policy: str, number: int, version: Version) -> Facts:
    return {
        "policy": policy,
        "version": number,
        "digest": version.proof.digest,
        "path": str(version.path),
        "costs": version.proof.costs,
    }


def _publish_facts(policy: str, published: Published) -> Facts:
    return {
        "policy": policy,
        "default_version": published.default_version,
        "versions": {number: version.proof.digest for number, version in published.versions.items()},
    }


def _default_of(published: Published) -> str:
    return f"version {published.default_version} ({published.default.proof.digest[:12]})"


def _only(published: Published, versions: Mapping[int, Version]) -> Published:
    """`published` with nothing but `versions`; the newest of them by default, where the default is not among them."""
    default = published.default_version if published.default_version in versions else max(versions)
    previous = published.previous_version
    is_left = previous in versions and previous != default
    return Published(versions=versions, default_version=default, previous_version=previous if is_left else 0)


def _check_loaded(published: Published, version: int) -> None:
    if version not in published.versions:
        raise PolicyError(
            Reason.VERSION_NOT_FOUND,
            f"version: expected one that is loaded, {sorted(published.versions)}, got {version}",
        )


def _as_policy_error(error: ControlError) -> PolicyError:
    try:
        return PolicyError(Reason(error.reason), error.detail)
    except ValueError:
        return PolicyError(Reason.INTERNAL_ERROR, error.detail)
