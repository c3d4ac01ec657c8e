"""Resources that every test gives back."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest


def open_files(directory: Path) -> list[str]:
    """The files below a directory that this process has open, where the system can tell."""
    found = []
    descriptors = Path("/proc/self/fd")
    for descriptor in descriptors.iterdir() if descriptors.is_dir() else ():
        try:
            target = os.readlink(descriptor)
        except FileNotFoundError:  # the descriptor that listed the directory
            continue
        if Path(target).is_relative_to(directory):
            found.append(target)
    return found


@pytest.fixture(autouse=True)
def _nothing_stays_open(tmp_path: Path) -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert open_files(tmp_path) == []
    assert [each for each in set(threading.enumerate()) - before if each.name == "replaystore-commit"] == []


@pytest.fixture
def _no_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for the disk, in tests that are not about power cuts."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
