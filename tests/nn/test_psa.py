"""PSAModule computes what the paper says, compared with independent loops in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import epsanet_fused as ef

Array = NDArray[np.float64]

INPLANS, PLANES, GROUPS, KERNELS = 8, 32, (1, 2, 4, 8), (3, 5, 7, 9)


def make_module(stride: int = 1) -> ef.PSAModule:
    """A small float64 module; its weights are so large that the attention differs by branch."""
    module = ef.PSAModule(INPLANS, PLANES, KERNELS, stride, GROUPS, reduction=2).double()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    return module


def weights(module: torch.nn.Module) -> dict[str, Array]:
    return {name: p.detach().numpy() for name, p in module.named_parameters()}


def convolve(x: Array, weight: Array, stride: int, groups: int) -> Array:
    """Convolve (B, C, H, W) with (K, C / groups, k, k), padded by k // 2, per output channel."""
    B, _, H, W = x.shape
    K, per_group, k, _ = weight.shape
    padded = np.pad(x, ((0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    out = np.zeros((B, K, -(-H // stride), -(-W // stride)))
    for o in range(K):
        first = o // (K // groups) * per_group
        for i in range(out.shape[2]):
            for j in range(out.shape[3]):
                rows, columns = slice(i * stride, i * stride + k), slice(j * stride, j * stride + k)
                window = padded[:, first : first + per_group, rows, columns]
                out[:, o, i, j] = (window * weight[o]).sum((1, 2, 3))
    return out


def squeeze_excite(x: Array, w: dict[str, Array], prefix: str = "") -> Array:
    """(B, C, H, W) -> (B, C)."""
    fc1, fc2 = w[prefix + "fc1.weight"][..., 0, 0], w[prefix + "fc2.weight"][..., 0, 0]
    hidden = np.maximum(x.mean((2, 3)) @ fc1.T + w[prefix + "fc1.bias"], 0)
    return 1 / (1 + np.exp(-(hidden @ fc2.T + w[prefix + "fc2.bias"])))


def psa(x: Array, w: dict[str, Array], stride: int) -> Array:
    branches = [
        convolve(x, w[f"conv_{s + 1}.weight"], stride, groups) for s, groups in enumerate(GROUPS)
    ]
    exponents = [np.exp(squeeze_excite(branch, w, "se.")) for branch in branches]
    total = sum(exponents)
    scaled = [
        branch * (e / total)[:, :, None, None]
        for branch, e in zip(branches, exponents, strict=True)
    ]
    return np.concatenate([scaled[3], scaled[2], scaled[1], scaled[0]], axis=1)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (7, 7), (5, 8), (1, 1)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_psa_module_computes_the_papers_formula(size: tuple[int, int], stride: int) -> None:
    module, x = make_module(stride), torch.randn(2, INPLANS, *size, dtype=torch.float64)
    expected = psa(x.numpy(), weights(module), stride)
    assert expected.shape == (2, PLANES, -(-size[0] // stride), -(-size[1] // stride))
    np.testing.assert_allclose(module(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_se_squeezes_then_excites() -> None:
    se = ef.SEWeightModule(12, reduction=3).double()
    x = torch.randn(3, 12, 5, 4, dtype=torch.float64)
    out = se(x)
    assert out.shape == (3, 12, 1, 1)
    expected = squeeze_excite(x.numpy(), weights(se))
    np.testing.assert_allclose(out[..., 0, 0].detach().numpy(), expected, rtol=1e-13)


def test_last_branch_comes_first() -> None:
    """With fc2 at zero, the attention of each branch is 1 / 4, and only the order is left."""
    module, x = make_module(), torch.randn(1, INPLANS, 4, 4, dtype=torch.float64)
    torch.nn.init.zeros_(module.se.fc2.weight)
    expected = torch.cat([conv(x) / 4 for conv in reversed(list(module.children())[:4])], 1)
    torch.testing.assert_close(module(x), expected)


def test_state_dict_has_the_official_keys() -> None:
    """All branches share one SE, and convolutions have no bias."""
    assert list(ef.PSAModule(64, 64).state_dict()) == [
        *(f"conv_{k}.weight" for k in (1, 2, 3, 4)),
        *(f"se.{fc}.{part}" for fc in ("fc1", "fc2") for part in ("weight", "bias")),
    ]


def test_default_arguments_are_the_papers() -> None:
    convs = list(ef.PSAModule(128, 128).children())[:4]
    assert [conv.kernel_size for conv in convs] == [(3, 3), (5, 5), (7, 7), (9, 9)]
    assert [conv.groups for conv in convs] == [1, 4, 8, 16]
    assert ef.PSAModule(128, 128).se.fc1.weight.shape == (2, 32, 1, 1)  # reduction 16
