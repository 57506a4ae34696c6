"""The bundle's README: the manifest for people."""

import json

from lom_bundle import Manifest, SpaceSpec

_TEMPLATE = """\
---
library_name: lom
pipeline_tag: reinforcement-learning
tags: [offline-reinforcement-learning, onnx, lom]
---

# {policy}

A LOM policy (Learning on One Mode, arXiv 2412.03258) exported for `lom-serve`.

| | |
| --- | --- |
| inputs | {inputs} |
| action | {action} |
| variants | {variants} (default: `{default_variant}`) |
| control period | {period} |
| components | {num_components}; never chosen below a mixing weight of {min_mixing_weight:g} |
| contract hash | `{contract_hash}` |
| golden rows | {golden_rows}; within {action_tolerance:g} of the action range; tie below margin {tie_width:.3g} |

`greedy_mode` acts by the mean of the component with the highest hyper-Q; `actor` by the network that imitates that
component's better actions. They are different policies.
{choice}

## Warnings

{warnings}

```json
{provenance}
```
"""


def model_card(manifest: Manifest) -> str:
    """Markdown with front matter, made from the manifest alone."""
    evaluation = manifest.evaluation
    choice = "The default was not chosen by an evaluation."
    if evaluation:
        choice = f"The default is what training recommends ({evaluation['recommended']['reason']})."
    if "variants" in evaluation:
        returns = ", ".join(f"`{name}` {result['return_mean']:.2f}" for name, result in evaluation["variants"].items())
        choice = (
            f"The default was chosen by {evaluation['episodes']} episodes of {evaluation['env']} at export: {returns} "
            f"({evaluation['recommended']['reason']})."
        )
    return _TEMPLATE.format(
        policy=manifest.policy,
        inputs=", ".join(_space(space) for space in manifest.inputs),
        action=f"{_space(manifest.action)} in [{min(manifest.action.low):g}, {max(manifest.action.high):g}]",
        variants=", ".join(f"`{name}`" for name in manifest.variants) + f" in {manifest.precision}",
        default_variant=manifest.default_variant,
        num_components=manifest.num_components,
        min_mixing_weight=manifest.min_mixing_weight,
        contract_hash=manifest.contract_hash,
        golden_rows=manifest.golden.rows,
        action_tolerance=manifest.golden.action_tolerance,
        tie_width=manifest.golden.tie_width,
        period=f"{manifest.control_period_s:g} s" if manifest.control_period_s else "not stated",
        choice=choice,
        warnings=_warnings(manifest),
        provenance=json.dumps(dict(manifest.provenance), indent=2),
    )


def _space(space: SpaceSpec) -> str:
    return f"`{space.name}` {space.dtype}{list(space.shape)}" + (f" ({space.elements})" if space.elements else "")


def _warnings(manifest: Manifest) -> str:
    if not manifest.warnings:
        return "None: the training run held fewer than two episodes to calibrate on."
    lines = ["| score | warns above | false alarms asked for | on held-out rows | calibration |", "| --- " * 5 + "|"]
    for name, warning in manifest.warnings.items():
        limits = ", ".join(f"`{variant}` {limit:.4g}" for variant, limit in warning.thresholds.items())
        measured = ", ".join(f"`{variant}` {rate:.2%}" for variant, rate in warning.held_out_false_alarms.items())
        where = f"{measured or 'not measured'} ({warning.held_out_rows} rows, {warning.held_out_episodes} episodes)"
        lines.append(f"| `{name}` | {limits} | {warning.false_alarm_rate:.1%} | {where} | {warning.calibration} |")
    return "\n".join(lines)
