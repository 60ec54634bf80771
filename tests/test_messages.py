"""Errors for names that do not exist: what was asked, the nearest match, all that is known."""

import pytest

from refkl.messages import nearest, unknown


@pytest.mark.parametrize(
    ("name", "expected"),
    [("reverse-kl", " Did you mean 'reverse_kl'?"), ("jds", " Did you mean 'jsd'?"), ("total_variation", ""), ("", "")],
)
def test_nearest(name, expected):
    assert nearest(name, ["forward_kl", "reverse_kl", "jsd"]) == expected


def test_unknown_lists_what_is_known_in_order():
    assert str(unknown("strategy", "clones", {"zero3": 0, "clone": 0, "adapter": 0})) == (
        "Unknown strategy 'clones'. Did you mean 'clone'? Known: adapter, clone, zero3."
    )
    assert str(unknown("mode", "x", ["token-mean"])) == "Unknown mode 'x'. Known: token-mean."
