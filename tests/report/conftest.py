"""A report without its picture."""

import pytest


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without their picture, which takes longer than all the rest."""
    monkeypatch.setattr("lit_eemllm.report.draw", lambda rows: b"")
