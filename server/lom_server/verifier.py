"""A throw-away process that proves a bundle before any serving process hears of it.

Whatever a bundle does when it is read, loaded and run (crash, hang, eat memory, answer wrongly), it does it here. What
is left of a failed attempt is a sentence; what is left of a successful one is the digest, and what a run costs.
"""

import dataclasses
import json
import os
import resource
import signal
import sys
from pathlib import Path

from lom_api.reasons import Reason
from lom_bundle import read_bundle
from lom_bundle.signature import load_trusted_key
from lom_server.config import ServerConfig
from lom_server.control import refused
from lom_server.engine import OnnxEngine, available_providers
from lom_server.loading import max_rows_of
from lom_server.logs import configure_logs
from lom_server.proof import Proof


def main() -> None:
    """Proves the bundle of its first argument by the configuration of its second; answers with a line of JSON."""
    bundle, config = Path(sys.argv[1]), ServerConfig.from_json(sys.argv[2])
    configure_logs(config.log_format, config.log_level)
    output = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        answer = dataclasses.asdict(_proof(bundle, config))
    except MemoryError:
        answer = {"reason": Reason.MODEL_TOO_LARGE, "detail": "expected a bundle that fits into the memory limit"}
    except Exception as error:
        refusal = refused(error)
        answer = {"reason": refusal.reason, "detail": refusal.detail}
    os.write(output, json.dumps(answer).encode() + b"\n")


def _proof(path: Path, config: ServerConfig) -> Proof:
    signal.setitimer(signal.ITIMER_REAL, config.load_limit_s)  # ends the process, should nobody be left to do it
    # CUDA reserves address space by the hundred gigabytes: under a limit on it, the processor would be proved instead.
    may_use_cuda = config.provider != "cpu" and "CUDAExecutionProvider" in available_providers()
    if config.load_memory_mb and not may_use_cuda:
        limit = config.load_memory_mb * 1024 * 1024
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    bundle = read_bundle(path, trusted_keys=[load_trusted_key(key) for key in config.trusted_keys])
    engine = OnnxEngine(
        bundle,
        provider=config.provider,
        allow_fallback=config.allow_provider_fallback,
        intra_op_threads=config.intra_op_threads,
        allow_spinning=config.allow_spinning,
    )
    engine.self_check()
    return Proof(
        digest=bundle.digest,
        provider=engine.provider,
        costs=engine.measured_costs(max_rows_of(bundle.manifest, config)),
    )


if __name__ == "__main__":
    main()
