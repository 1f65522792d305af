"""The operator: everything of a PSA module that follows its convolutions, and its backward.

``psa_tail`` is what users call. Behind it is one pair of functional operators registered with
torch.library; what the backward needs (squeeze and attention, both tiny) are outputs of the
forward, so that compilers, checkpointing and CUDA graphs see all there is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from epsanet_fused.backends import reference
from epsanet_fused.backends.registry import chosen, native_path, resolve
from epsanet_fused.ops.checks import check_psa_tail
from epsanet_fused.utils.memory_format import accumulator_dtype, empty_grad, empty_output

ADVICE = "run the forward under epsanet_fused.use_backend('reference') for more"

_FORWARD = (
    "(Tensor[] branches, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, "
    "Tensor fc2_bias, Tensor? scale, Tensor? shift, bool relu, {}) "
    "-> (Tensor out, Tensor squeeze, Tensor attention)"
)
_BACKWARD = (
    "(Tensor grad, Tensor[] branches, Tensor squeeze, Tensor attention, "
    "Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, "
    "bool branch_grads, bool fc_grads, {}) "
    "-> (Tensor[] grad_branches, Tensor[] grad_fc)"
)
LIBRARY = torch.library.Library("epsanet_fused", "DEF")
LIBRARY.define("psa_tail" + _FORWARD.format("str backend"))
LIBRARY.define("psa_tail_backward" + _BACKWARD.format("str backend"))
# The compiled library's kernels, by themselves: no choice of backend, no autograd, no Python. The
# fc weights may have the 1 x 1 of a convolution.
LIBRARY.define("psa_tail_native" + _FORWARD.format("int path"))
LIBRARY.define("psa_tail_native_backward" + _BACKWARD.format("int path"))
LIBRARY.define("psa_tail_inference" + _FORWARD.format("int path").partition("->")[0] + "-> Tensor")
_inference = torch.ops.epsanet_fused.psa_tail_inference.default


def psa_tail(
    branches: Sequence[Tensor],
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Squeeze, excite, select, recalibrate and concatenate in reverse (arXiv 2105.14447, 3.2).

    For branch s with channels c: ``attention = softmax_s(sigmoid(fc2 relu(fc1 mean_hw(x_s))))``
    and ``out[:, (S - 1 - s) * C + c] = x_s[:, c] * attention[:, s, c]``.

    Args:
        branches: S >= 2 tensors (B, C, H, W), of one shape, dtype and device; the branch of the
            smallest kernel first. float16, bfloat16, float32 or float64; any strides; B may be 0.
        fc1_weight: (R, C, 1, 1) or (R, C). The fc tensors may be of any of these dtypes.
        fc1_bias: (R,).
        fc2_weight: (C, R, 1, 1) or (C, R).
        fc2_bias: (C,).
        scale, shift, relu: epilogue for inference, with (S * C,) vectors in the order of the
            output's channels: ``out = relu(scale * out + shift)``, each part where it is given.

    Returns:
        (B, S * C, H, W) in the branches' dtype, branch S - 1 first; channels_last if every branch
        is, else contiguous. Sums are accumulated in float32 (float64 for float64).

    Raises:
        TypeError: for what is no tensor, or of a dtype that isn't accepted.
        ValueError: for shapes and devices that don't fit, or an epilogue where a gradient is due.
        RuntimeError: if the backend asked for can't run on these tensors.
        NotImplementedError: for second derivatives and forward-mode differentiation.

    Differentiable once. For higher orders and torch.func use ``use_backend("reference")``.
    """
    name = chosen()
    arguments = (branches, fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale, shift, relu)
    failure = None
    if name != "reference" and not torch.compiler.is_compiling():
        try:
            out = _without_gradient(name, *arguments)
            if out is not None:
                return out
        except Exception as error:  # told below in the user's terms, if the arguments are to blame
            failure = error
    if not torch.jit.is_tracing():  # where sizes are tensors, which warn when they are compared
        check_psa_tail(*arguments)
    if failure is not None:
        raise failure
    fc = (fc1_weight.flatten(1), fc1_bias, fc2_weight.flatten(1), fc2_bias)
    if name == "reference":
        return reference.forward(branches, *fc, scale, shift, relu)[0]
    return torch.ops.epsanet_fused.psa_tail(branches, *fc, scale, shift, relu, name)[0]


def _without_gradient(
    name, branches, fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale, shift, relu
):
    """The output by the compiled library, or None where another backend or autograd has to run.

    It spares the checks in Python, as the library refuses whatever they refuse, and two more trips
    through Python: the smaller the tail, the more they weigh. What the library can't know is left
    to the checks, too: a gradient that is due, and a relu that isn't a bool.
    """
    if not isinstance(branches, (list, tuple)) or not isinstance(relu, bool):
        return None
    fc = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    refuse_forward_mode("psa_tail", (*branches, *fc))
    path = native_path(name, branches)
    if path is None:
        return None
    if torch.is_grad_enabled():
        epilogue = [v for v in (scale, shift) if v is not None]
        if any(t.requires_grad for t in (*branches, *fc, *epilogue)):
            return None
    return _inference(branches, *fc, scale, shift, relu, path)


def refuse_forward_mode(operator: str, tensors: Sequence[Tensor]) -> None:
    """torch.library has no forward mode; without a word, tangents would be lost."""
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise NotImplementedError(f"{operator} has no forward-mode derivative; {ADVICE}")


@torch.library.impl(LIBRARY, "psa_tail", "CompositeExplicitAutograd")
def _forward(branches, fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale, shift, relu, backend):
    run = resolve(backend, branches[0].device.type, branches).forward
    return run(branches, fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale, shift, relu)


@torch.library.impl(LIBRARY, "psa_tail_backward", "CompositeExplicitAutograd")
def _backward(grad, branches, *rest):
    *tensors_and_flags, backend = rest
    run = resolve(backend, grad.device.type, branches).backward
    return run(grad, branches, *tensors_and_flags)


@torch.library.register_fake("epsanet_fused::psa_tail", lib=LIBRARY)
def _fake_forward(branches, fc1_weight, fc1_bias, fc2_weight, fc2_bias, *epilogue_and_choice):
    x = branches[0]
    stats = (x.shape[0], len(branches), x.shape[1])  # (B, S, C)
    acc = accumulator_dtype(x.dtype)
    return empty_output(branches), x.new_empty(stats, dtype=acc), x.new_empty(stats, dtype=acc)


@torch.library.register_fake("epsanet_fused::psa_tail_native", lib=LIBRARY)
def _fake_native(*arguments_and_path):
    check_psa_tail(*arguments_and_path[:-1])
    return _fake_forward(*arguments_and_path)


@torch.library.register_fake("epsanet_fused::psa_tail_inference", lib=LIBRARY)
def _fake_inference(*arguments_and_path):
    return _fake_native(*arguments_and_path)[0]


@torch.library.register_fake("epsanet_fused::psa_tail_backward", lib=LIBRARY)
@torch.library.register_fake("epsanet_fused::psa_tail_native_backward", lib=LIBRARY)
def _fake_backward(
    grad, branches, squeeze, attention, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
    branch_grads, fc_grads, choice,
):  # fmt: skip
    fc = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return (
        [empty_grad(x) for x in branches] if branch_grads else [],
        [p.new_empty(p.shape) for p in fc] if fc_grads else [],
    )


def _setup_context(ctx, inputs, output):
    branches, *fc, scale, shift, relu, backend = inputs
    _, squeeze, attention = output
    ctx.mark_non_differentiable(squeeze, attention)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*branches, squeeze, attention, *fc)
    ctx.backend = backend
    ctx.has_epilogue = scale is not None or shift is not None or relu


def _autograd(ctx, grad, _grad_squeeze, _grad_attention):
    if ctx.has_epilogue:
        raise NotImplementedError("psa_tail: scale, shift and relu have no gradient")
    *branches, squeeze, attention, fc1_weight, fc1_bias, fc2_weight, fc2_bias = ctx.saved_tensors
    wants_branches, *wants_fc = ctx.needs_input_grad[:5]
    none_branches = [None] * len(branches)
    if grad is None:
        return none_branches, None, None, None, None, None, None, None, None
    grad_branches, grad_fc = torch.ops.epsanet_fused.psa_tail_backward(
        grad, branches, squeeze, attention, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
        any(wants_branches), any(wants_fc), ctx.backend,
    )  # fmt: skip
    grad_fc = grad_fc or (None, None, None, None)
    return grad_branches or none_branches, *grad_fc, None, None, None, None


def refuse_second_derivative(operator: str) -> None:
    """For an operator that is the backward of another: an autograd formula that says so."""

    def backward(ctx, *grads):
        raise NotImplementedError(f"{operator} is differentiable once; {ADVICE}")

    name = f"epsanet_fused::{operator}_backward"
    torch.library.register_autograd(name, backward, lib=LIBRARY)


torch.library.register_autograd(
    "epsanet_fused::psa_tail", _autograd, setup_context=_setup_context, lib=LIBRARY
)
refuse_second_derivative("psa_tail")
