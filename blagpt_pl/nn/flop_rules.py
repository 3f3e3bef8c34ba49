"""What one operation of torch costs in multiply-adds, read off the shapes of its arguments.

Counts   matrix products (by the formulas of torch.utils.flop_counter) and convolutions; a multiply-add is two, a
         complex one eight
Zero     by convention: elementwise operations, reductions and cumulative sums, softmaxes, norms and elementwise losses,
         random numbers, and what only makes, moves or looks up elements. They are bound by memory, not by arithmetic
Unknown  everything else, such as sort, fft, linalg, pooling, operations of other libraries and higher-order ones
Differs  torch's formula for the backward pass of a convolution counts the weight of a grouped one as if it were dense
"""

from collections.abc import Sequence
from functools import cache
from math import prod

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm}
BY_VECTOR = {aten.mv, aten.addmv, aten.dot, aten.vdot}  # one multiply-add for each element of the larger factor

MADE = """arange bernoulli empty empty_like empty_permuted empty_strided exponential eye fill full full_like
lift_fresh linspace logspace native_dropout new_empty new_empty_strided new_full new_ones new_zeros normal ones
ones_like promote_types rand rand_like randint randint_like randn randn_like randperm scalar_tensor tril_indices
triu_indices uniform zero zeros zeros_like"""

MOVED = """_reshape_alias _reshape_copy _to_copy _unsafe_view as_strided_scatter cat constant_pad_nd copy detach
diagonal_backward diagonal_scatter flip pixel_shuffle pixel_unshuffle reflection_pad1d repeat replication_pad1d
resize roll select_backward select_scatter set slice_backward slice_scatter stack tril triu unfold_backward
unsafe_chunk unsafe_split unsafe_split_with_sizes"""

LOOKED_UP = """_index_put_impl _unsafe_index _unsafe_index_put embedding embedding_dense_backward gather index
index_add index_copy index_fill index_put index_select masked_scatter scatter scatter_add scatter_reduce take"""

SUMMED = """_safe_softmax _softmax _softmax_backward_data _log_softmax _log_softmax_backward_data all amax amin
aminmax any argmax argmin count_nonzero cummax cummin cumprod cumsum linalg_vector_norm logcumsumexp logsumexp max
mean min nansum norm prod std std_mean sum var var_mean"""

NORMED = """_fused_rms_norm _fused_rms_norm_backward _native_batch_norm_legit _native_batch_norm_legit_no_training
native_batch_norm native_batch_norm_backward native_group_norm native_group_norm_backward native_layer_norm
native_layer_norm_backward"""

ELEMENTWISE = """_prelu_kernel _prelu_kernel_backward binary_cross_entropy binary_cross_entropy_backward
binary_cross_entropy_with_logits complex glu glu_backward hardswish hardswish_backward huber_loss
huber_loss_backward log_sigmoid_backward log_sigmoid_forward mse_loss mse_loss_backward nll_loss_backward
nll_loss_forward polar smooth_l1_loss smooth_l1_loss_backward"""

FREE = set(f"{MADE} {MOVED} {LOOKED_UP} {SUMMED} {NORMED} {ELEMENTWISE}".split())


def name_of(operation: object) -> str:
    """An operation as torch writes it, whichever overload: aten::sort."""
    name = operation._schema.name if isinstance(operation, torch._ops.OpOverload) else operation.name()
    return name if "::" in name else f"{operation.namespace}::{name}"


@cache
def is_free(operation: object) -> bool:
    """Whether it counts as nothing, by convention."""
    if not isinstance(operation, torch._ops.OpOverload) or operation.namespace not in ("aten", "prim"):
        return False
    name = operation._schema.name.partition("::")[2]
    plain = name.removesuffix("_")  # in place
    if (
        operation.namespace == "prim"
        or operation.is_view
        or torch.Tag.inplace_view in operation.tags
        or plain in FREE
        or name.startswith("_foreach_")
    ):
        return True
    return any(is_elementwise(each) for each in (name, plain, name.removesuffix("_backward")))


def is_elementwise(name: str) -> bool:
    """Whether torch says so of an operation of this name."""
    packet = getattr(aten, name, None)
    return packet is not None and any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())


def flops(operation: object, args: Sequence, out: object) -> int | None:
    """Multiplications and additions of one call, or None where it has no rule.

    Args:
        operation: what a `TorchDispatchMode` is handed.
        args: its positional arguments; of tensors only the shapes are read.
        out: what it returned.
    """
    packet = getattr(operation, "_overloadpacket", None)
    tensors = [a for a in args if isinstance(a, Tensor)]
    if packet in PRODUCTS:
        count = flop_registry[packet](*tensors, out_val=out)
    elif packet is aten.convolution:
        x, weight, _, _, _, _, transposed, *_ = args
        count = 2 * len(x) * weight.numel() * prod((x if transposed else out).shape[2:])  # each tap at each position
    elif packet is aten.convolution_backward:
        grad, x, weight, _, _, _, _, transposed, _, _, (by_x, by_weight, _) = args
        count = 2 * len(x) * weight.numel() * prod((x if transposed else grad).shape[2:]) * (by_x + by_weight)
    elif packet in BY_VECTOR:
        count = 2 * max(t.numel() for t in tensors)
    else:
        return 0 if is_free(operation) else None
    return 4 * count if any(t.is_complex() for t in tensors) else count


def attention_flops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: object = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: object,
) -> int:
    """The same for torch's scaled_dot_product_attention: half of the pairs where it is causal, else all of them."""
    pairs = query.shape[:-1].numel() * key.shape[-2]
    return pairs * (query.shape[-1] + value.shape[-1]) * (1 if is_causal else 2)
