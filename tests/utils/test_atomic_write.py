"""Test that files are written whole or not at all."""

from __future__ import annotations

import os

import pytest

from epsanet_fused.utils.atomic_write import write_atomically


def test_files_are_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"before")

    def fails(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"after")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path], "no temporary file stays"
