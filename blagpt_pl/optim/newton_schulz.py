"""Newton-Schulz: nearly the nearest semi-orthogonal matrix, by matrix products alone, for a batch of matrices at once.

Source   Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", kellerjordan.github.io/posts/muon,
         where the coefficients are from; the nearest semi-orthogonal matrix of X = U S V' is U V'
Formula  X <- X / (|X|_F + 1e-7);  five times: A = X X',  X <- a X + (b A + c A A) X,  a, b, c = 3.4445, -4.7750, 2.0315
Differs  a batch of one shape is a single chain of batched products
Band     the coefficients trade exactness for speed: of the singular values, those that begin at `LEAST` of the norm or more
         end in `BAND` instead of at 1; five iterations lift smaller ones less far
Dtype    products in bfloat16 on CUDA, in float32 elsewhere, and in float64 for matrices in float64; norms in float32 or wider
Cost     r <= c: steps · (4 r² c + 2 r³) FLOP a matrix (r, c)
"""

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315
EPS = 1e-7
LEAST, BAND = 0.003, (0.68, 1.21)


def working_dtype(x: Tensor) -> torch.dtype:
    """The type in which the products of a matrix are made."""
    if x.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if x.device.type == "cuda" else torch.float32


def newton_schulz(x: Tensor, steps: int) -> Tensor:
    """The orthogonalisation of each matrix of a batch.

    Args:
        x: (n, r, c) with r <= c.
        steps: iterations.

    Returns:
        (n, r, c) in `working_dtype`. A matrix of zeros stays one.
    """
    size = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    x = (x / (size + EPS)).to(working_dtype(x))
    for _ in range(steps):
        gram = x @ x.mT  # (n, r, r)
        polynomial = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        x = torch.baddbmm(x, polynomial, x, beta=A)
    return x
