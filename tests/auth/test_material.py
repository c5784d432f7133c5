"""Keys by their ids, and what they must not show."""

from __future__ import annotations

from broker.auth.material import FixedKeys, Material


def test_several_keys_may_share_an_id() -> None:
    keys = [Material("a", b"1"), Material("a", b"2"), Material(None, b"3")]
    fixed = FixedKeys(keys)
    assert fixed.find("a") == keys[:2]
    assert fixed.find(None) == keys[2:]
    assert len(fixed) == 3


def test_key_material_never_shows_in_a_repr() -> None:
    assert "hidden" not in repr(Material("a", b"hidden", b"hidden"))
