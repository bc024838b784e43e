"""The divergence of stored logits by Triton kernels: one read of both rows for KL, two for JSD, one for the gradient.

Rows off the mask cost nothing, and no number is read back to the host. There is no kernel for hidden states.
"""

from torch import Tensor

from ..fused import interpreted, obstacle_to_kernels
from .rows import Stats

BLOCK_V = 4096
"""logits of each of the two rows per program: together as many as one program of the statistics reads"""


def obstacle(p: Tensor, q: Tensor) -> str | None:
    """Return why the kernels cannot read logits p and q; None if they can. The two may have different dtypes."""
    return obstacle_to_kernels(p.device, p.dtype) or obstacle_to_kernels(q.device, q.dtype)


def logits_forward(p: Tensor, q: Tensor, *, mask: Tensor | None, beta: float | None, alpha: float) -> Stats:
    from ...kernels.divergence import divergence

    mask = None if mask is None else mask.contiguous()
    return Stats(*divergence(p, q, needed=mask, beta=beta, alpha=alpha, config=_config(p.shape[-1])))


def logits_backward(
    p: Tensor, q: Tensor, stats: Stats, g: Tensor, *, mask: Tensor | None, beta: float | None, alpha: float,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    from ...kernels.divergence_backward import divergence_backward

    mask = None if mask is None else mask.contiguous()
    rowwise = (stats.upstream(g), *stats[1:7])
    return divergence_backward(
        p, q, *(x.contiguous() for x in rowwise), needed=mask, beta=beta, alpha=alpha, needs=needs,
        config=_config(p.shape[-1]),
    )  # fmt: skip


def _config(vocab: int):
    from ...kernels.config import LogitsConfig, interpreter_logits_config

    return interpreter_logits_config(vocab) if interpreted() else LogitsConfig(block_v=BLOCK_V)
