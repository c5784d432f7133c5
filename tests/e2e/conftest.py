"""Every test in this folder runs on a clock that passes as usual and may jump (:func:`harness.jump`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.harness import run_on_jumping_clock


@pytest.hookimpl(trylast=True)  # after pytest-trio
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and item.get_closest_marker("trio") is not None:
            item.add_marker(pytest.mark.trio(run=run_on_jumping_clock), append=False)  # its marker gives way
