"""From the files of a bundle to a policy that can be published. Blocks: not for an event loop's thread."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lom_api.reasons import Reason
from lom_bundle import EXPLAIN_SUFFIX, BundleError, Manifest, read_bundle
from lom_bundle.signature import load_trusted_key
from lom_server.batcher import Lane, rows_worth_inlining
from lom_server.config import ServerConfig
from lom_server.costs import RunCost
from lom_server.engine import OnnxEngine
from lom_server.service import ServedPolicy

MESSAGE_OVERHEAD_BYTES = 64 * 1024
"""What a message may hold beside its rows."""

# What every answer carries where the variant has it. Diagnostics come from the explain graph, for who asks.
_ANSWERED_OUTPUTS = ("action", "mode", "margin", "state_score", "action_score")
# Others are being answered by this process: no more than one session's creation in a row stands in their way.
_PAUSE_S = 0.02


@dataclass(frozen=True, kw_only=True)
class LoadedPolicy:
    """A policy and what runs it."""

    policy: ServedPolicy
    engine: OnnxEngine


def load_policy(
    name: str,
    version: int,
    bundle: Path,
    config: ServerConfig,
    *,
    digest: str = "",
    costs: Mapping[str, Mapping[int, int]] | None = None,
) -> LoadedPolicy:
    """Reads, checks, loads and warms up `bundle`, to be served as `version` of `name`.

    Args:
        digest: refused where it is given and the bundle has another: it was changed since it was proved.
        costs: what a run costs, by graph and rows, where that has been measured already.

    Raises:
        BundleError: the bundle is not intact or not trusted, or its graphs do not reproduce its golden rows.
        StartError: the execution provider is not to be had, or a graph does not load.
    """
    files = read_bundle(bundle, trusted_keys=[load_trusted_key(key) for key in config.trusted_keys])
    if digest and files.digest != digest:
        raise BundleError(
            Reason.DIGEST_MISMATCH, f"expected the bundle {digest[:12]} that was proved, got {files.digest[:12]}"
        )
    engine = OnnxEngine(
        files,
        provider=config.provider,
        allow_fallback=config.allow_provider_fallback,
        intra_op_threads=config.intra_op_threads,
        allow_spinning=config.allow_spinning,
        pause_s=_PAUSE_S,
    )
    engine.self_check()
    max_batch_rows = max_rows_of(files.manifest, config)
    if costs is None:
        costs = engine.measured_costs(max_batch_rows)
    else:
        engine.warm_up(costs)
    policy = ServedPolicy(
        name=name,
        version=version,
        manifest=files.manifest,
        bundle_digest=files.digest,
        lanes={graph: _lane(engine, graph, costs[graph], max_batch_rows, config) for graph in engine.graphs},
        provider=engine.provider,
        max_batch_rows=max_batch_rows,
    )
    return LoadedPolicy(policy=policy, engine=engine)


def max_rows_of(manifest: Manifest, config: ServerConfig) -> int:
    """Rows of the largest request that fits into a message, and into a batch."""
    row_bytes = sum(4 * len(space.low) for space in manifest.inputs)
    return max(1, min(config.max_batch_rows, (config.max_message_bytes - MESSAGE_OVERHEAD_BYTES) // row_bytes))


def _lane(engine: OnnxEngine, graph: str, costs: Mapping[int, int], max_batch_rows: int, config: ServerConfig) -> Lane:
    outputs = engine.graphs[graph]
    if not graph.endswith(EXPLAIN_SUFFIX):
        outputs = tuple(name for name in _ANSWERED_OUTPUTS if name in outputs)
    measured_rows = rows_worth_inlining(costs, max_batch_rows)
    inline_rows = {"auto": measured_rows, "inline": max_batch_rows, "thread": 0}[config.inference]
    return Lane(engine=engine, graph=graph, outputs=outputs, inline_rows=inline_rows, cost=RunCost(costs))
