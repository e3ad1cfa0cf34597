"""Detect a diverged chain and explain why it diverged."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsample.errors import DivergenceError


@dataclass(frozen=True)
class Stability:
    """Stability limit of the step, used to detect a diverged chain and to explain it.

    Attributes:
        curvature: largest curvature seen, in the metric's coordinates.
        limit: largest stable step at that curvature.
        radius: a distance from the mode that no chain reaches unless it diverges.
    """

    curvature: float
    limit: float
    radius: float

    def check(self, params: Tensor, round: int, step: float) -> None:
        """Raise if a chain has diverged.

        Args:
            params: (C, d) positions after the round.
            round: the round.
            step: the step size h of that round.

        Raises:
            DivergenceError: with the step, the curvature and the largest stable step.
        """
        bad = ~(params.abs().amax(-1) < self.radius)
        if bool(bad.any()):
            chain = int(bad.nonzero()[0])
            raise DivergenceError(f"chain {chain} diverged in round {round}: {self.explain(step)}")

    def explain(self, step: float) -> str:
        """Explain why a chain diverges at this step, and what to do."""
        seen = f"the curvature {self.curvature:.4g} (the largest seen, in the metric's coordinates)"
        limit = f"the largest stable step is {self.limit:.4g}"
        if not step < self.limit:
            advice = "Set step_size well below it, or to 'auto'"
            return f"the step {step:.4g} is too large for {seen}, where {limit}. {advice}"
        return (
            f"the step {step:.4g} is below the stability limit for {seen}, where {limit}: either the curvature is "
            "larger away from the mode, or clients' gradients are so large beside their sum that what a compressor "
            "leaves out throws the chain. Scale the data (and a Gaussian's target, or model.noise_scale, to its "
            "residuals), or lower step_size"
        )
