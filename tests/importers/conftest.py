"""Importing needs no account: W&B, which some sources switch on, is offline here."""

import pytest


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `check` asks of W&B is met."""
    monkeypatch.setenv("WANDB_MODE", "offline")
