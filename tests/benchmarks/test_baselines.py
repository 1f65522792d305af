"""Test the networks that EPSANet is compared with."""

from __future__ import annotations

import baselines
import pytest


@pytest.mark.parametrize("baseline, parameters", [("resnet50", 25557032), ("seresnet50", 28088024)])
def test_baselines_are_the_published_networks(baseline, parameters):
    network = baselines.BASELINES[baseline]()
    assert sum(p.numel() for p in network.parameters()) == parameters
