"""The constraint that moves the expected sparsity to its target (Sheared-LLaMA, arXiv:2310.06694, equation 3)."""

from torch import Tensor


def lagrangian(sparsity: Tensor, target: float, linear: Tensor, quadratic: Tensor) -> Tensor:
    """λ1 · (s − t) + λ2 · (s − t)², averaged over rows.

    Gates minimise this term, multipliers maximise it.

    Args:
        sparsity: expected share s of zero gates of every row.
        target: target share t of zero gates.
        linear: multiplier λ1 of every row.
        quadratic: multiplier λ2 of every row.
    """
    gap = sparsity - target
    return (linear * gap + quadratic * gap.square()).mean()


def warmed_up(target: float, start: float, progress: float) -> float:
    """The target sparsity after ``progress`` (0 … 1) of the warm-up: linear from ``start`` to ``target``."""
    return start + (target - start) * min(1.0, progress)
