from __future__ import annotations

import pytest
from click.testing import CliRunner

from bench.__main__ import main
from bench.scenarios import SCENARIOS


@pytest.mark.parametrize("name", [*(kind.name for kind in SCENARIOS), "all"])
def test_help_documents_every_option(name: str) -> None:
    shown = CliRunner().invoke(main, [name, "--help"])
    assert shown.exit_code == 0
    assert "--repeat" in shown.output
    assert "default" in shown.output


def test_unknown_peer() -> None:
    refused = CliRunner().invoke(main, ["fanout", "--vs", "nginx"])
    assert refused.exit_code == 2
    assert "'nginx' is none of floor, ws, socketio, websockets" in refused.output
