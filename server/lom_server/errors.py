"""Why the server does not answer, or does not start; facts as attributes, no transport in sight."""

import logging
import uuid

from lom_api.reasons import Reason

_logger = logging.getLogger(__name__)

MAX_QUOTED_CHARACTERS = 64


class PolicyError(Exception):
    """A request that gets no action.

    Attributes:
        reason: code of the closed vocabulary that travels on the wire.
        detail: the sentence after it; holds no path, no class name and no text of a library.
        retry_after_ms: when the same request may find the server free; None where that is not the point.
    """

    def __init__(self, reason: Reason, detail: str, *, retry_after_ms: int | None = None) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.retry_after_ms = retry_after_ms


class StartError(Exception):
    """A server that must not start serving.

    Attributes:
        reason: fixed code, e.g. `PROVIDER_UNAVAILABLE`.
        detail: the sentence for the operator: what was wrong, what was expected, what was got.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def quoted(text: str) -> str:
    """`text` in quotes, escaped to printable ASCII and cut: the only way a caller's text enters a message."""
    escaped = text[:MAX_QUOTED_CHARACTERS].encode("unicode_escape").decode("ascii")
    if len(text) > MAX_QUOTED_CHARACTERS or len(escaped) > MAX_QUOTED_CHARACTERS:
        escaped = escaped[: MAX_QUOTED_CHARACTERS - 3] + "..."
    return f"'{escaped}'"


def log_incident(what: str, error: BaseException) -> str:
    """Logs `error` with its traceback under a fresh id, and returns the id: all of it that a caller may see."""
    incident = uuid.uuid4().hex[:12]
    _logger.error("%s, id %s", what, incident, exc_info=error, extra={"incident": incident})
    return incident
