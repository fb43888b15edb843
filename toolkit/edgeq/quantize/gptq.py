"""GPTQ: round one input after the other, and let the inputs still to come make up for each error.

For a matrix W and the second moments H = E[x x^T] of its inputs the error of an output is (w - q) H (w - q)^T. GPTQ
(Frantar et al. 2022, https://arxiv.org/abs/2210.17323) goes through the inputs in order with the Cholesky factor of
the inverse of H. Here each group's scale is chosen when its turn comes, from the weights as the errors before have
left them; afterwards scales are fitted to the codes by least squares, and codes changed one by one where that
lowers the error, others being fixed (cyclic coordinate descent, as in QuantEase, https://arxiv.org/abs/2309.01885).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.quantize import ggml, mse, rtn
from edgeq.quantize.solution import BlockSolution, Solution
from edgeq.recipe import Layout

DAMPING = 0.01
SHARE = 0.5
SWEEPS = 2
_RUN = 128


@dataclass(frozen=True)
class Curvature:
    """Second moments of a matrix's inputs, damped, and what GPTQ needs of them: float32 tensors [inputs, inputs].

    factor: upper Cholesky factor of the inverse. Made by `curvature`.
    """

    hessian: Any
    factor: Any


def curvature(hessian: Any) -> Curvature:
    """Curvature of second moments (a float32 tensor [inputs, inputs], taken over), `DAMPING` of their mean added.

    Raises torch.linalg.LinAlgError when they are not finite.
    """
    import torch

    damping = max(DAMPING * float(hessian.diagonal().mean()), float(np.finfo(np.float32).tiny))
    hessian.diagonal().add_(damping)
    factor = torch.empty_like(hessian).mT  # columns lie together, as LAPACK wants them, which then needs no copy
    torch.linalg.cholesky(hessian, out=factor)
    torch.cholesky_inverse(factor, out=factor)
    torch.linalg.cholesky(factor, upper=True, out=factor)
    return Curvature(hessian, factor)


def compensated(weights: NDArray[np.float32], missed: Any, curved: Curvature) -> NDArray[np.float32]:
    """Weights [outputs, inputs] that make up for what the layers before have lost, as far as `SHARE` goes.

    missed: mean of W (x - q) q^T, a tensor [outputs, inputs], where x is a matrix's input in the float model and q in
    the quantized one. W x is best approximated from q by W + missed H^-1 (GPTAQ, https://arxiv.org/abs/2504.02692); all
    of it fits noise too.
    """
    import torch

    moved = missed @ curved.factor.T @ curved.factor
    found: NDArray[np.float32] = (torch.from_numpy(weights) + SHARE * moved).numpy()
    return found


def quantize(weights: NDArray[np.float32], curved: Curvature, layout: Layout, name: str) -> Solution | BlockSolution:
    """Solution of rows [outputs, inputs] of a matrix.

    Rows are independent, so any cut of a matrix gives the same, but for the last bit of a float16 scale of ggml's.
    A row whose weights are not finite gets scales that are not.
    """
    import torch

    weights = np.ascontiguousarray(weights)
    wanted = torch.from_numpy(weights).T.contiguous()
    grids = _Grids(layout, wanted, curved)
    codes = _propagate(wanted.clone(), curved, grids)
    if not layout.is_ggml:
        grids.fit(wanted, codes, curved.hessian)
    _descend(wanted, codes, curved.hessian, grids)
    return grids.solution(codes, name)


def error(weights: NDArray[np.float32], values: NDArray[np.float32], hessian: Any) -> float:
    """Sum over outputs of (w - q) H (w - q)^T for rows [outputs, inputs]."""
    import torch

    lost = torch.from_numpy(weights - values)
    return float(((lost @ hessian) * lost).sum())


class _Grids:
    """Where codes of each group lie: value = (code + low) * step - offset, or levels[code] * step."""

    def __init__(self, layout: Layout, wanted: Any, curved: Curvature) -> None:
        import torch

        inputs, outputs = wanted.shape
        self.layout, self.top = layout, (1 << layout.bits) - 1
        self.block = max(layout.block, layout.group)
        self.low = -(1 << (layout.bits - 1)) if layout.symmetric and not layout.is_ggml else 0
        self.steps, self.offsets = (torch.zeros(inputs // layout.group, outputs) for _ in range(2))
        self.levels: Any = None
        self.middles: Any = None
        self._importance = curved.factor.diagonal().reciprocal().square().numpy()
        self._parts: list[Any] = []

    def choose(self, start: int, weights: Any) -> None:
        """Choose the grids of the block that begins at input `start`, for weights [inputs of the block, outputs]."""
        import torch

        layout, here = self.layout, slice(start, start + self.block)
        rows, importance = np.ascontiguousarray(weights.T.numpy()), self._importance[here]
        groups = slice(start // layout.group, (start + self.block) // layout.group)
        if layout.is_ggml:
            found = ggml.unpack(ggml.quantize(rows, layout, importance), layout, "")
            each = layout.block // layout.group
            steps = np.repeat(found.super_scales, each, axis=1) * found.scales
            offsets = np.repeat(found.super_minimums, each, axis=1) * found.minimums
            self._take_levels(found.levels)
            self._parts.append(found)
        else:
            grouped = rows.reshape(len(rows), -1, layout.group)
            weighed = importance.reshape(-1, layout.group)
            steps, zeros = mse.grid(grouped, layout.bits, symmetric=layout.symmetric, importance=weighed)
            offsets = np.zeros_like(steps) if layout.symmetric else steps * zeros
            self._parts.append(zeros)
        self.steps[groups], self.offsets[groups] = (torch.from_numpy(each.T.copy()) for each in (steps, offsets))

    def _take_levels(self, levels: NDArray[np.float32]) -> None:
        import torch

        if (np.diff(levels) == 1).all():
            self.low = int(levels[0])
            self.top = len(levels) - 1
        else:
            self.levels = torch.from_numpy(levels)
            self.middles = (self.levels[1:] + self.levels[:-1]) / 2

    def nearest(self, index: int, values: Any) -> tuple[Any, Any]:
        """Codes (as float32) nearest to values [outputs] of one input, and what they stand for."""
        import torch

        group = index // self.layout.group
        step, offset = self.steps[group], self.offsets[group]
        scaled = (values + offset) / step
        scaled = torch.where(step == 0, torch.zeros((), dtype=scaled.dtype), scaled)
        if self.levels is None:
            codes = torch.round_(scaled).sub_(self.low).clamp_(0, self.top)
            return codes, (codes + self.low) * step - offset
        codes = torch.bucketize(scaled, self.middles)
        return codes.to(torch.float32), self.levels[codes] * step - offset

    def values(self, codes: Any) -> Any:
        """What codes [inputs, outputs] stand for."""
        import torch

        steps, offsets = (each.repeat_interleave(self.layout.group, 0) for each in (self.steps, self.offsets))
        levels = codes + self.low if self.levels is None else self.levels[codes.to(torch.int64)]
        return levels * steps - offsets

    def fit(self, wanted: Any, codes: Any, hessian: Any) -> None:
        """Best scales of plain grids for codes that are given, one group after the other."""
        import torch

        missing = hessian @ (wanted - self.values(codes))
        group = self.layout.group
        zeros = torch.from_numpy(np.concatenate(self._parts, axis=1).astype(np.float32))
        for index in range(len(self.steps)):
            here = slice(index * group, (index + 1) * group)
            zero = zeros[:, index]
            levels = codes[here] - zero
            curve = (levels * (hessian[here, here] @ levels)).sum(0)
            slope = (levels * missing[here]).sum(0)
            step = self.steps[index]
            moved = torch.where(curve > 0, step + slope / curve, step)
            rounded = torch.from_numpy(rtn.to_float16(moved.numpy()))
            rounded = torch.where(torch.isfinite(rounded) & torch.isfinite(step), rounded, step)
            missing -= hessian[:, here] @ (levels * (rounded - step))
            self.steps[index] = rounded
            if not self.layout.symmetric:
                self.offsets[index] = rounded * zero

    def solution(self, codes: Any, name: str) -> Solution | BlockSolution:
        """Solution of codes [inputs, outputs] on these grids."""
        rows = np.ascontiguousarray(codes.numpy().T).astype(np.uint8)
        if not self.layout.is_ggml:
            scales = np.ascontiguousarray(self.steps.numpy().T)
            zeros = np.concatenate(self._parts, axis=1)
            return Solution(name, self.layout.bits, self.layout.group, rows, scales, zeros)
        joined = {
            field: np.concatenate([getattr(part, field) for part in self._parts], axis=1)
            for field in ("scales", "minimums", "super_scales", "super_minimums")
        }
        return BlockSolution(name=name, layout=self.layout, levels=self._parts[0].levels, codes=rows, **joined)


def _propagate(weights: Any, curved: Curvature, grids: _Grids) -> Any:
    """Codes [inputs, outputs], float32, by GPTQ; `weights` is used up."""
    import torch

    factor, codes, block = curved.factor, torch.empty_like(weights), grids.block
    run = block if _RUN < block < len(weights) else max(_RUN // block * block, _RUN)
    errors = torch.empty(run, weights.shape[1])
    for start in range(0, len(weights), run):
        stop = min(start + run, len(weights))
        for index in range(start, stop):
            if index % block == 0:
                grids.choose(index, weights[index : index + block])
            codes[index], value = grids.nearest(index, weights[index])
            missed = (weights[index] - value) / factor[index, index]
            weights[index + 1 : stop].addr_(factor[index, index + 1 : stop], missed, alpha=-1)
            errors[index - start] = missed
        weights[stop:].addmm_(factor[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    return codes


def _descend(wanted: Any, codes: Any, hessian: Any, grids: _Grids) -> None:
    """Change codes in place, one input after the other, to the best for all others as they are."""
    for _ in range(SWEEPS):
        values = grids.values(codes)
        missing = hessian @ (wanted - values)
        for start in range(0, len(wanted), _RUN):
            here = slice(start, min(start + _RUN, len(wanted)))
            before, part, near = values[here].clone(), missing[here].clone(), hessian[here, here]
            for index in range(start, here.stop):
                at = index - start
                target = values[index] + part[at] / near[at, at]
                codes[index], value = grids.nearest(index, target)
                part.addr_(near[:, at], value - values[index], alpha=-1)
                values[index] = value
            missing.addmm_(hessian[:, here], values[here] - before, alpha=-1)
