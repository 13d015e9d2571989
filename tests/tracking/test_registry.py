"""Models of MLflow's registry, on an embedded store."""

from __future__ import annotations

from pathlib import Path

import pytest
from stoker import BadInput, StokerError
from stoker.cli.verbs import ui
from stoker.tracking.registry import Registry

from servers import free_port

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # MLflow's own


def test_a_promotion_that_is_cut_short_leaves_a_model_in_production(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(runs)
    registry._client.create_registered_model("m")
    for _ in range(3):
        registry._client.create_model_version("m", source="runs:/none/model")
    registry.promote("m@1", "production")
    with monkeypatch.context() as cut:
        for request in ("set_model_version_tag", "delete_registered_model_alias"):
            cut.setattr(registry._client, request, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            registry.promote("m@2", "production")
    assert registry.version("m@production").version == 2
    registry.promote("m@2", "production")
    assert [version.stage for version in registry.versions("m")][1:] == ["production", "archived"]
    registry.promote("m@2", "archived")
    assert [version.stage for version in registry.versions("m")][1:] == ["archived", "archived"]
    with pytest.raises(BadInput, match="has no version 'production'"):
        registry.version("m@production")


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


def test_a_server_that_is_down_is_said_to_be(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(StokerError, match=f"the MLflow server at {url} does not answer: start it"):
        Registry(runs).models()
    with pytest.raises(BadInput, match=f"^runs are tracked at {url}: open that page"):
        ui.ui(runs / "none")
