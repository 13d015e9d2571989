"""Who is told what of a trial that is spread over machines."""

from __future__ import annotations

from stoker.tune.on_ray import _environments
from stoker.tune.ray_host import HostPlace


def test_ranks_of_a_machine_share_its_gpus_and_count_by_themselves() -> None:
    places = [
        HostPlace("a", "10.0.0.1", 4000, ("2",)), HostPlace("a", "10.0.0.1", 4001, ("0",)),
        HostPlace("b", "10.0.0.2", 4000, ("5",)),
    ]  # fmt: skip
    told = _environments(places)
    assert [t["RANK"] for t in told] == ["0", "1", "2"]
    assert [t["LOCAL_RANK"] for t in told] == ["0", "1", "0"]
    assert [t["LOCAL_WORLD_SIZE"] for t in told] == ["2", "2", "1"]
    assert [t["CUDA_VISIBLE_DEVICES"] for t in told] == ["2,0", "2,0", "5"]
    assert {(t["WORLD_SIZE"], t["MASTER_ADDR"], t["MASTER_PORT"]) for t in told} == {
        ("3", "10.0.0.1", "4000")
    }


def test_a_single_rank_is_told_nothing() -> None:
    assert _environments([HostPlace("a", "10.0.0.1", 4000, ("1",))]) == [{}]
