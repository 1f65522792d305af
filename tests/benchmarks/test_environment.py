"""Test the description of the machine."""

from __future__ import annotations

import os

import environment

SMI_LINE = "NVIDIA H200, 580.65.06, 143771 MiB, [N/A]\n"


def test_smi_answers_are_parsed_by_field():
    fields = ("name", "driver_version", "memory.total", "mig.mode.current")
    found = environment.parse_smi(SMI_LINE * 2, fields)
    assert found == {
        "name": "NVIDIA H200",
        "driver_version": "580.65.06",
        "memory.total": "143771 MiB",
        "mig.mode.current": "[N/A]",
    }
    assert environment.parse_smi("", fields) == {}
    assert environment.parse_smi("Field is not a valid field to query.\n", fields) == {}


def test_smi_is_only_queried(monkeypatch, tmp_path):
    """A refused query is repeated field by field. No setting is changed."""
    asked = tmp_path / "asked"
    fake = tmp_path / "nvidia-smi"
    fake.write_text(
        f'#!/bin/sh\necho "$@" >> {asked}\ncase "$1" in *,*) exit 2;; '
        f'--query-gpu=name) echo "A GPU";; *) exit 2;; esac\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert environment.query_smi() == {"name": "A GPU"}
    for line in asked.read_text().splitlines():
        query, form = line.split()
        assert query.startswith("--query-gpu=") and form == "--format=csv,noheader"
