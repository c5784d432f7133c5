"""The microbenchmarks run, and each trick is there to be compared with the plain way."""

from __future__ import annotations

import pytest

from bench import micro


@pytest.mark.parametrize("name", ["decode", "encode", "frames", "handshake"])
def test_each_compares(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(micro, "best", lambda function, _number=1: float(function() is None))
    assert micro.main([name]) == 0
    assert capsys.readouterr().out.startswith(f"{name}: ")


def test_an_unknown_name_lists_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert micro.main(["nonsense"]) == 2
    assert "frames" in capsys.readouterr().err
