"""What figures were measured on."""

import platform


def processor() -> str:
    """The processor's model where Linux tells it, else the architecture."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
