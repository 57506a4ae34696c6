"""What an operator may ask, on a listener that robots do not reach.

`lom_api.v1.AdminService`, and the repository calls of the Open Inference Protocol for tools that know only those.
"""

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from lom_api.reasons import Reason
from lom_api.v1 import admin_pb2
from lom_server.edges import oip_schema
from lom_server.edges.authentication import Role
from lom_server.edges.listener import Call, Listener, parsed
from lom_server.errors import PolicyError, quoted
from lom_server.supervisor import LoadState, PolicyState, Supervisor, VersionState

SERVICE_NAME: str = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name

_STATES: Mapping[LoadState, "admin_pb2.LoadState.ValueType"] = {
    LoadState.ON_DISK: admin_pb2.LOAD_STATE_ON_DISK,
    LoadState.LOADING: admin_pb2.LOAD_STATE_LOADING,
    LoadState.READY: admin_pb2.LOAD_STATE_READY,
    LoadState.FAILED: admin_pb2.LOAD_STATE_FAILED,
}
_OIP_STATES: Mapping[LoadState, str] = {
    LoadState.ON_DISK: "UNAVAILABLE",
    LoadState.LOADING: "LOADING",
    LoadState.READY: "READY",
    LoadState.FAILED: "UNAVAILABLE",
}
# What tritonclient sends by itself. Everything else (a configuration, a file's bytes) would be obeyed by nobody.
_IGNORED_PARAMETER = "unload_dependents"

_Result = TypeVar("_Result")


class AdminEdge:
    """Bytes to operations of a `Supervisor`, and states back."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def register(self, listener: Listener) -> None:
        """Adds both services to `listener`, for administrators only."""
        listener.add_service(
            SERVICE_NAME,
            unary={
                "ListPolicies": self._list,
                "LoadPolicy": self._load,
                "UnloadPolicy": self._unload,
                "PromotePolicy": self._promote,
                "RollBackPolicy": self._roll_back,
            },
            role=Role.ADMIN,
        )
        listener.add_service(
            oip_schema.SERVICE.full_name,
            unary={
                "RepositoryIndex": self._repository_index,
                "RepositoryModelLoad": self._repository_load,
                "RepositoryModelUnload": self._repository_unload,
            },
            role=Role.ADMIN,
        )

    async def _list(self, message: bytes, _: Call) -> bytes:
        parsed(admin_pb2.ListPoliciesRequest, message)
        policies = [_state_message(state) for state in self._supervisor.list_policies()]
        return admin_pb2.ListPoliciesReply(policies=policies).SerializeToString()

    async def _load(self, message: bytes, _: Call) -> bytes:
        request = parsed(admin_pb2.LoadPolicyRequest, message)
        return _reply(await _finished(self._supervisor.load(request.policy, request.version, promote=request.promote)))

    async def _unload(self, message: bytes, _: Call) -> bytes:
        request = parsed(admin_pb2.UnloadPolicyRequest, message)
        return _reply(await _finished(self._supervisor.unload(request.policy, request.version, force=request.force)))

    async def _promote(self, message: bytes, _: Call) -> bytes:
        request = parsed(admin_pb2.PromotePolicyRequest, message)
        return _reply(await _finished(self._supervisor.promote(request.policy, request.version)))

    async def _roll_back(self, message: bytes, _: Call) -> bytes:
        request = parsed(admin_pb2.RollBackPolicyRequest, message)
        return _reply(await _finished(self._supervisor.roll_back(request.policy)))

    async def _repository_index(self, message: bytes, _: Call) -> bytes:
        request = parsed(oip_schema.message_type("RepositoryIndexRequest"), message)
        response = oip_schema.message_type("RepositoryIndexResponse")()
        for policy in self._supervisor.list_policies():
            for version in policy.versions:
                if version.state is LoadState.READY or not request.ready:
                    response.models.add(
                        name=policy.policy,
                        version=str(version.version),
                        state=_OIP_STATES[version.state],
                        reason=version.reason,
                    )
        return _reply_bytes(response)

    async def _repository_load(self, message: bytes, _: Call) -> bytes:
        request = parsed(oip_schema.message_type("RepositoryModelLoadRequest"), message)
        _refuse_parameters(request.parameters)
        await _finished(self._supervisor.load(request.model_name, promote=True))
        return _reply_bytes(oip_schema.message_type("RepositoryModelLoadResponse")())

    async def _repository_unload(self, message: bytes, _: Call) -> bytes:
        request = parsed(oip_schema.message_type("RepositoryModelUnloadRequest"), message)
        _refuse_parameters(request.parameters)
        await _finished(self._supervisor.unload(request.model_name, force=True))
        return _reply_bytes(oip_schema.message_type("RepositoryModelUnloadResponse")())


async def _finished(operation: Coroutine[Any, Any, _Result]) -> _Result:
    """An operator who hangs up must not leave some workers changed and others not."""
    return await asyncio.shield(operation)


def _refuse_parameters(parameters: Mapping[str, object]) -> None:
    for name in parameters:
        if name != _IGNORED_PARAMETER:
            raise PolicyError(
                Reason.UNKNOWN_PARAMETER, f"parameter {quoted(name)}: a bundle carries all that it is, expected none"
            )


def _reply(state: PolicyState) -> bytes:
    return _reply_bytes(_state_message(state))


def _reply_bytes(message: Any) -> bytes:
    content: bytes = message.SerializeToString()
    return content


def _state_message(state: PolicyState) -> admin_pb2.PolicyState:
    return admin_pb2.PolicyState(
        policy=state.policy,
        default_version=state.default_version,
        previous_version=state.previous_version,
        survives_restart=state.survives_restart,
        versions=[_version_message(version) for version in state.versions],
    )


def _version_message(version: VersionState) -> admin_pb2.VersionState:
    return admin_pb2.VersionState(
        version=version.version,
        state=_STATES[version.state],
        reason=version.reason,
        bundle_digest=version.digest,
    )
