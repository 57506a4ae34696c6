"""The LOM policy inference server: answers observations with actions, from a bundle that proves itself first."""

from lom_server.config import ServerConfig
from lom_server.errors import PolicyError, StartError
from lom_server.lifecycle import RunningServer, serve

__all__ = ["PolicyError", "RunningServer", "ServerConfig", "StartError", "serve"]
