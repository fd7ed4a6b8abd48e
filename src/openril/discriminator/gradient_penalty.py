"""A penalty on how fast the discriminator's logit changes with the embeddings of a response.

A discriminator that tells two sides apart by a few tokens has steep logits, of which the similarity reward then carries
little but noise. The penalty is that of R1 (arXiv 1801.04406) and of adversarial motion priors (2104.02180), zero-centered
like theirs, on both sides. Text has no points between two responses, so that the interpolation of arXiv 1704.00028 has no
meaning here; embeddings are what the gradient can be taken by.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from openril.models.packing import Batch


def logits_and_slopes(network: Any, backbone: Any, rows: Batch) -> tuple[Tensor, Tensor]:
    """Return the logits [R] of the network, and the squared norms [R] of their gradients, which can be differentiated.

    The gradient of each logit is by the embeddings of its response's own tokens: those after the prompt's head, which the
    responses share.

    Args:
        network: Maps ``rows`` to logits, possibly wrapped.
        backbone: The transformers model in it, whose embeddings are looked up once in a pass.
    """
    looked_up: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Tensor) -> Tensor:
        looked_up.append(output if output.requires_grad else output.requires_grad_())
        return looked_up[-1]

    hook = backbone.get_input_embeddings().register_forward_hook(keep)
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            logits = network(rows)
    finally:
        hook.remove()
    [embeddings] = looked_up
    # Only the logit of a row depends on its tokens, so that one gradient of the sum holds the gradients of all logits.
    (gradient,) = torch.autograd.grad(logits.sum(), embeddings, create_graph=True)
    squares = gradient.float().square().sum(-1).flatten()
    lengths, most = rows.mask.sum(1, keepdim=True), rows.mask.shape[1]
    back = torch.arange(most, device=squares.device)[None]
    own = (rows.last[:, None] - back).clamp(min=0)
    return logits, torch.where(back < lengths, squares[own], 0.0).sum(1)
