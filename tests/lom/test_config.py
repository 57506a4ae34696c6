import json
from dataclasses import asdict, replace

import pytest

from lom.config import PRESETS, TrainConfig


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_preset_survives_json(preset: str) -> None:
    config = PRESETS[preset]
    assert TrainConfig.from_json(json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(("rows", "expected"), [(49_999, 0.05), (50_000, 0.001)])
def test_many_rows_support_smaller_weights(rows: int, expected: float) -> None:
    assert TrainConfig().for_rows(rows).effective_min_mixing_weight == expected
    assert TrainConfig(min_mixing_weight=0.3).for_rows(rows).min_mixing_weight == 0.3


@pytest.mark.parametrize(("components", "expected"), [(8, 0.05), (20, 0.025), (50, 0.01), (1, 0.05)])
def test_the_support_threshold_leaves_room_for_equal_weights(components: int, expected: float) -> None:
    config = TrainConfig(num_components=components, min_mixing_weight=0.05)
    assert config.effective_min_mixing_weight == pytest.approx(expected)
    assert config.effective_min_mixing_weight < 1 / components


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("num_components", 0),
        ("hidden", ()),
        ("hidden", (64, 0)),
        ("critic_learning_rate", 0.0),
        ("discount", 1.1),
        ("discount", float("nan")),
        ("inverse_temperature", float("inf")),
        ("min_mixing_weight", -0.1),
        ("reward_scale", 0.0),
        ("seed", -1),
        ("hazard", 1.1),
        ("bound_margin", -0.01),
        ("bound_margin", 0.6),
        ("widening_share", 1.1),
    ],
)
def test_a_bad_value_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field}: expected .*, got "):
        replace(TrainConfig(), **{field: value})  # type: ignore[arg-type]


def test_an_unknown_field_of_a_newer_version_is_refused() -> None:
    with pytest.raises(ValueError, match="novelty"):
        TrainConfig.from_json({"novelty": 1})


def test_the_digest_changes_with_any_field() -> None:
    assert TrainConfig().digest == TrainConfig().digest
    assert TrainConfig().digest != TrainConfig(seed=1).digest


def test_a_run_from_before_there_was_a_limit_has_none() -> None:
    document = asdict(TrainConfig(hazard=0.7))
    assert TrainConfig.from_json(document).hazard == 0.7
    del document["hazard"]
    assert TrainConfig.from_json(document).hazard == 0.0
