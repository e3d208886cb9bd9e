"""Into meta tokens, by soft assignment."""

from __future__ import annotations

from torch import Tensor

from tokenops.ops.arguments import check_device, check_tensor, refuse_forward_mode, under_autocast
from tokenops.ops.token_merge import operators as operators
from tokenops.ops.token_merge.arguments import as_statistic, check_grids, check_same_size, check_width
from tokenops.reference.token_merge import check_temperature


def soft_merge(
    x: Tensor,  # [B, N, C]
    metric: Tensor,  # [B, N, F]
    meta: Tensor,  # [B, M, F]
    *,
    temperature: float | Tensor,
    mass: Tensor | None = None,
    normalize: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # merged [B, M, C], mass [B, M] float32
    """Let every token give its mass to the meta tokens it resembles, and average. The N x M scores are never stored.

    p[n, m] = softmax over m of s(metric[n], meta[m]) / temperature; mass[m] = sum_n p[n, m] mass_in[n];
    merged[m] = sum_n p[n, m] mass_in[n] x[n] / mass[m], 0 where mass[m] is 0.

    Args:
        x, metric, meta: float32, bfloat16, float16 or float64. Half types accumulate in float32.
        temperature: positive; a number, or a tensor of one (float32, float64 with float64 tokens) to learn.
        mass: [N], [B, N] or [B, N, 1] float32 (float64 with float64 tokens), what each token has to give. Default 1.
        normalize: s is the cosine of the angle, 0 for a zero row; False: the dot product.
        backend: as in ``merge_tokens``.

    The mass that comes out (float32, float64 with float64 tokens) sums to the mass that went in. Differentiable once in x, metric, meta,
    temperature and mass; the backward pass computes the scores anew. Under autocast x, metric and meta are cast.

    Source: C. Renggli et al., "Learning to Merge Tokens in Vision Transformers", 2022 (softmax over tokens there, over meta tokens here);
    meta tokens with a mass are our reading of Feng et al., "STTM", 2023.

    Raises:
        ValueError: sizes, ranks or devices disagree, a row of metric or meta is not finite, a mass is negative or NaN, the temperature
            is not positive (contents of tensors are checked on the CPU; on a GPU if TOKENOPS_CHECK=1).
        TypeError: a dtype is wrong.
        NotImplementedError: the named backend cannot serve the call, with its reasons; a forward-mode derivative is asked for.
        RuntimeError: the result is differentiated twice.

    >>> x, meta = torch.randn(2, 196, 64), torch.randn(2, 8, 64)
    >>> merged, mass = tokenops.soft_merge(x, x, meta, temperature=0.1)
    >>> merged.shape, mass.shape
    (torch.Size([2, 8, 64]), torch.Size([2, 8]))
    """
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
    else:
        fixed = check_temperature(float(temperature))
    if mass is not None:
        mass = as_statistic("mass", mass, "x", x, last=True)
    refuse_forward_mode(x, metric, meta, learned, mass)
    merged, mass_out, _ = operators.soft_merge(x, metric, meta, learned, fixed, mass, normalize, backend)
    return merged.to(x.dtype), mass_out


def _as_temperature(temperature: Tensor, x: Tensor) -> Tensor:
    """[]"""
    wanted = operators.statistic_dtype(x)
    if temperature.dtype != wanted:
        raise TypeError(f"temperature must be {wanted} with {x.dtype} tokens, got {temperature.dtype}")
    if temperature.numel() != 1:
        raise ValueError(f"temperature must be one number, got {list(temperature.shape)}")
    check_device("temperature", temperature, "x", x)
    return temperature.reshape(())
