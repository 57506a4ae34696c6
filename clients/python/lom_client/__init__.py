"""Client of the LOM policy inference server, for programs that live inside a robot's control loop.

Needs numpy, grpcio and protobuf. This library is not a safety function: the robot's own limits and its emergency
stop stay in force.
"""

from lom_client.actions import Actions, Explanation, Score, Timings
from lom_client.async_client import AsyncPolicyClient
from lom_client.client import PolicyClient
from lom_client.config import ClientConfig
from lom_client.control_loop import ControlLoop, LoopAction
from lom_client.errors import (
    BadReply,
    ClientClosed,
    ContractMismatch,
    DeadlineExceeded,
    InvalidRequest,
    NotPermitted,
    Overloaded,
    PolicyError,
    PolicyNotFound,
    ServerFault,
    ServerUnavailable,
    Superseded,
)
from lom_client.flight_recorder import FlightRecorder
from lom_client.level_rules import Kind, OnWarning
from lom_client.levels import Flag, Level, Source
from lom_client.loop_config import LoopConfig
from lom_client.loop_counters import LoopCounters
from lom_client.loop_events import (
    BundleChanged,
    LevelChanged,
    LoopEvent,
    LoopStalled,
    OutOfDistribution,
    RecordingEnded,
)
from lom_client.loop_io import PolicyProcess
from lom_client.pacing import Tick, paced_ticks
from lom_client.served_policy import ServedPolicy
from lom_client.spec import PolicySpec, Space

__all__ = [
    "Actions",
    "AsyncPolicyClient",
    "BadReply",
    "BundleChanged",
    "ClientClosed",
    "ClientConfig",
    "ContractMismatch",
    "ControlLoop",
    "DeadlineExceeded",
    "Explanation",
    "Flag",
    "FlightRecorder",
    "InvalidRequest",
    "Kind",
    "Level",
    "LevelChanged",
    "LoopAction",
    "LoopConfig",
    "LoopCounters",
    "LoopEvent",
    "LoopStalled",
    "NotPermitted",
    "OnWarning",
    "OutOfDistribution",
    "Overloaded",
    "PolicyClient",
    "PolicyError",
    "PolicyNotFound",
    "PolicyProcess",
    "PolicySpec",
    "RecordingEnded",
    "Score",
    "ServedPolicy",
    "ServerFault",
    "ServerUnavailable",
    "Source",
    "Space",
    "Superseded",
    "Tick",
    "Timings",
    "paced_ticks",
]
