"""Into meta tokens, by soft assignment."""

from __future__ import annotations

from torch import Tensor

from tokenops.ops.arguments import check_device, check_tensor, refuse_forward_mode
from tokenops.ops.token_merge import operators as operators
from tokenops.ops.token_merge.arguments import as_statistic, check_grids, check_same_size, check_width, under_autocast


def soft_merge(
    x: Tensor,  # [B, N, C]
    metric: Tensor,  # [B, N, F]
    meta: Tensor,  # [B, M, F]
    *,
    temperature: float | Tensor,
    mass: Tensor | None = None,
    normalize: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # merged [B, M, C], mass [B, M]
    for name, grid in (("x", x), ("metric", metric), ("meta", meta)):
        check_tensor(name, grid)
    x, metric, meta = under_autocast(x), under_autocast(metric), under_autocast(meta)
    check_grids("NC NF MF", x=x, metric=metric, meta=meta)
    check_same_size("metric", metric, "x", x, 1, "N")
    check_same_size("meta", meta, "metric", metric, 2, "F")
    check_width("metric", metric)
    learned, fixed = None, 1.0
    if isinstance(temperature, Tensor):
        learned = _as_temperature(temperature, x)
    elif temperature > 0.0:
        fixed = float(temperature)
    else:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if mass is not None:
        mass = as_statistic("mass", mass, "x", x, last=True)
    refuse_forward_mode(x, metric, meta, learned, mass)
    merged, mass_out, _ = operators.soft_merge(x, metric, meta, learned, fixed, mass, normalize, backend)
    return merged, mass_out


def _as_temperature(temperature: Tensor, x: Tensor) -> Tensor:
    """[]"""
    wanted = operators.statistic_dtype(x)
    if temperature.dtype != wanted:
        raise TypeError(f"temperature must be {wanted} with {x.dtype} tokens, got {temperature.dtype}")
    if temperature.numel() != 1:
        raise ValueError(f"temperature must be one number, got {list(temperature.shape)}")
    check_device("temperature", temperature, "x", x)
    return temperature.reshape(())
