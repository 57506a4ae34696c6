"""The bundle's README: the manifest for people."""

import json

from lom_bundle import Manifest

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
| components | {num_components}; never chosen below a mixing weight of {min_mixing_weight:g} |
| contract hash | `{contract_hash}` |
| golden rows | {golden_rows}; within {action_tolerance:g} of the action range; tie below margin {tie_width:.3g} |

`greedy_mode` acts by the mean of the component with the highest hyper-Q; `actor` by the network that imitates that
component's better actions. They are different policies.
{choice}

```json
{provenance}
```
"""


def model_card(manifest: Manifest) -> str:
    """Markdown with front matter, made from the manifest alone."""
    evaluation = manifest.evaluation
    choice = "The default was not chosen by an evaluation."
    if evaluation:
        returns = ", ".join(f"`{name}` {result['return_mean']:.2f}" for name, result in evaluation["variants"].items())
        choice = (
            f"The default is the one that returned more over {evaluation['episodes']} episodes of "
            f"{evaluation['env']} at export: {returns}."
        )
    return _TEMPLATE.format(
        policy=manifest.policy,
        inputs=", ".join(f"`{space.name}` {space.dtype}{list(space.shape)}" for space in manifest.inputs),
        action=f"{manifest.action.dtype}{list(manifest.action.shape)} in [{min(manifest.action.low):g}, "
        f"{max(manifest.action.high):g}]",
        variants=", ".join(f"`{name}`" for name in manifest.variants),
        default_variant=manifest.default_variant,
        num_components=manifest.num_components,
        min_mixing_weight=manifest.min_mixing_weight,
        contract_hash=manifest.contract_hash,
        golden_rows=manifest.golden.rows,
        action_tolerance=manifest.golden.action_tolerance,
        tie_width=manifest.golden.tie_width,
        choice=choice,
        provenance=json.dumps(dict(manifest.provenance), indent=2),
    )
