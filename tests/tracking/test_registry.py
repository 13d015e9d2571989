"""Models of MLflow's registry, on an embedded store."""

from __future__ import annotations

from pathlib import Path

import pytest
from stoker import BadInput
from stoker.tracking.registry import Registry

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # MLflow's own


def test_a_model_is_found_among_more_than_an_answer_of_mlflow_has(runs: Path) -> None:
    registry = Registry(runs)
    for number in range(101):
        registry._client.create_registered_model(f"m{number:03d}")
    registry._client.create_model_version("m100", source="runs:/none/model")
    assert [version.name for version in registry.models()] == ["m100"]
    assert registry.version("m100").version == 1
    assert registry.versions("m000") == []
    with pytest.raises(BadInput, match="no model 'm0100'; did you mean 'm100'"):
        registry.versions("m0100")
