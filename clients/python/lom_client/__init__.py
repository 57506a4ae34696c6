"""Client of the LOM policy inference server, for programs that live inside a robot's control loop.

Needs numpy, grpcio and protobuf. This library is not a safety function: the robot's own limits and its emergency
stop stay in force.
"""

from lom_client.actions import Actions, Score, Timings
from lom_client.client import PolicyClient
from lom_client.config import ClientConfig
from lom_client.control_loop import ControlLoop, LoopCounters
from lom_client.errors import (
    BadReply,
    ClientClosed,
    ContractMismatch,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PolicyError,
    PolicyNotFound,
    ServerFault,
    ServerUnavailable,
)
from lom_client.fallback import LoopAction, Source
from lom_client.pacing import Tick, paced_ticks
from lom_client.spec import PolicySpec, Space

__all__ = [
    "Actions",
    "BadReply",
    "ClientClosed",
    "ClientConfig",
    "ContractMismatch",
    "ControlLoop",
    "DeadlineExceeded",
    "InvalidRequest",
    "LoopAction",
    "LoopCounters",
    "Overloaded",
    "PolicyClient",
    "PolicyError",
    "PolicyNotFound",
    "PolicySpec",
    "Score",
    "ServerFault",
    "ServerUnavailable",
    "Source",
    "Space",
    "Tick",
    "Timings",
    "paced_ticks",
]
