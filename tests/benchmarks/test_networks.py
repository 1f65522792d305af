"""Test the networks that EPSANet is compared with."""

from __future__ import annotations

import pytest
import torch
from harness import networks
from torch import nn


@pytest.mark.parametrize("baseline, parameters", [("resnet50", 25557032)])
def test_baselines_are_the_published_networks(baseline, parameters):
    network = networks.BASELINES[baseline]()
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_provider_names_its_network():
    assert networks.baseline_of("resnet50:eager") == "resnet50"
    assert networks.baseline_of("eager") is None
    assert networks.baseline_of("cuda:two_pass") is None, "a path of a backend"


def test_calibrated_network_has_the_statistics_of_the_images():
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.3))

    state = torch.get_rng_state()
    images = 5 + networks.noise(2, 3, 8, 8)
    network = networks.calibrated(build, images)
    assert not network.training and network[1].momentum == 0.3
    activations = network(images)
    means = activations.mean((0, 2, 3))
    torch.testing.assert_close(means, torch.zeros(4), rtol=0, atol=1e-5)
    assert torch.equal(networks.calibrated(build, images)[0].weight, network[0].weight)
    assert torch.equal(torch.get_rng_state(), state)
