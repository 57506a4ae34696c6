"""The artifact contract between training and serving: a folder that carries a policy and its own proof.

    bundle/
      manifest.json      what the policy takes and returns, who made it, sha256 of every other file
      greedy_mode.onnx   one complete graph per variant: raw observations in, environment-unit actions out
      actor.onnx
      greedy_mode_explain.onnx, actor_explain.onnx   likewise, with forced mode, noise and diagnostics (if it has modes)
      golden.npz         observations with the answers that torch gave; whoever loads the bundle replays them
      README.md          the same facts for people

Needs the standard library and numpy, nothing else: every room may read a bundle.
"""

from lom_bundle.errors import BundleError
from lom_bundle.golden import GoldenReport, check_golden
from lom_bundle.manifest import (
    EXPLAIN_SUFFIX,
    SCHEMA_VERSION,
    GoldenSpec,
    GraphSpec,
    Manifest,
    SpaceSpec,
    VariantSpec,
    WarningSpec,
)
from lom_bundle.reader import Bundle, read_bundle, read_manifest
from lom_bundle.writer import write_bundle

__all__ = [
    "EXPLAIN_SUFFIX",
    "SCHEMA_VERSION",
    "Bundle",
    "BundleError",
    "GoldenReport",
    "GoldenSpec",
    "GraphSpec",
    "Manifest",
    "SpaceSpec",
    "VariantSpec",
    "WarningSpec",
    "check_golden",
    "read_bundle",
    "read_manifest",
    "write_bundle",
]
