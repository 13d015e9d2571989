from __future__ import annotations

from stoker.data import cached


def test_what_an_earlier_version_has_cached_is_found_again() -> None:
    assert cached.name("a", 1, None, (2.5, "é"), {"b": True}) == "4c56b8b4d397657e5ca51f2b878dadaf"
    assert cached.name("a") != cached.name("a", "")
