"""Tests that start several processes run one at a time: pytest-xdist keeps their group on one worker."""

from __future__ import annotations

import pytest


@pytest.mark.xdist_group("ranks")
def test_tests_of_several_processes_are_one_group(request: pytest.FixtureRequest) -> None:
    """With pytest 9.2, groups of pytest-xdist 3.8 are lost without a word: it renames tests, and newer pytest does not see it."""
    apart = [
        item.nodeid
        for item in request.session.items
        if item.get_closest_marker("ranks") and not any(m.args == ("ranks",) for m in item.iter_markers("xdist_group"))
    ]
    assert apart == []
    if getattr(request.config.option, "loadgroup", False):
        assert request.node.nodeid.endswith("@ranks")
