"""Published peak speed of accelerators, and the share of it that a run reaches."""

from typing import NamedTuple

TERA = 1e12


class Peak(NamedTuple):
    """Dense peak of one JAX device in TFLOP/s by type of the products; None where there is no such unit."""

    bfloat16: float
    float32: float | None = None
    """For NVIDIA TF32, which is what XLA uses for float32 products at default precision."""
    int8: float | None = None
    float8: float | None = None


# Google: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, "Peak compute per chip". One chip is one JAX device on v4 to
# v6e; a TPU7x chip (2307 bfloat16, 4614 float8) is two devices.
# NVIDIA: the datasheets' Tensor Core figures, halved where they are given with sparsity.
_PEAKS: dict[str, Peak] = {
    "tpu v2": Peak(22.5),  # 45 a chip of two devices
    "tpu v3": Peak(61.5),  # 123 a chip of two devices
    "tpu v4": Peak(275.0, int8=275.0),
    "tpu v5 lite": Peak(197.0, int8=393.0),
    "tpu v5e": Peak(197.0, int8=393.0),
    "tpu v5": Peak(459.0, int8=918.0),
    "tpu v5p": Peak(459.0, int8=918.0),
    "tpu v6 lite": Peak(918.0, int8=1836.0),
    "tpu v6e": Peak(918.0, int8=1836.0),
    "tpu7x": Peak(1153.5, float8=2307.0),
    "tpu v7x": Peak(1153.5, float8=2307.0),
    "a100": Peak(312.0, 156.0, 624.0),
    "a10": Peak(125.0, 62.5, 250.0),
    "a10g": Peak(70.0, 35.0, 140.0),
    "l4": Peak(121.0, 60.0, 242.5, 242.5),
    "l40s": Peak(362.05, 183.0, 733.0, 733.0),
    "h100 pcie": Peak(756.0, 378.0, 1513.0, 1513.0),
    "h100 nvl": Peak(835.5, 417.5, 1670.5, 1670.5),
    "h100": Peak(989.4, 494.7, 1978.9, 1978.9),
    "h200": Peak(989.4, 494.7, 1978.9, 1978.9),
    "gh200": Peak(989.4, 494.7, 1978.9, 1978.9),
    "b200": Peak(2250.0, 1100.0, 4500.0, 4500.0),
    "gb200": Peak(2500.0, 1250.0, 5000.0, 5000.0),
}


def peak_flops(device_kind: str, dtype: str = "bfloat16") -> float | None:
    """Peak FLOP/s of one JAX device (`jax.devices()[0].device_kind`), None where it is not known, as for CPUs.

    `dtype` is that of the products: bfloat16, float16, float32, int8 or a float8.
    """
    kind = device_kind.lower().strip()
    words = kind.replace("-", " ").replace("_", " ").split()
    named = [
        name for name in _PEAKS if name == kind or ("nvidia" in words and set(name.split()) <= set(words))
    ]
    if not named:
        return None
    peak = _PEAKS[max(named, key=len)]
    column = "float8" if dtype.startswith("float8") else "bfloat16" if dtype == "float16" else dtype
    if column not in Peak._fields:
        raise ValueError(f"dtype must be one of {', '.join(Peak._fields)} or float16, got {dtype!r}")
    tera = getattr(peak, column)
    return None if tera is None else tera * TERA


def mfu(
    flops_per_token: int | float, tokens_per_second: int | float, devices: int, peak: int | float | None
) -> float | None:
    """Model FLOP utilisation [0..1]: model FLOPs a second over the peak of all devices; None where no peak is known.

    `tokens_per_second` is that of the whole run. Say which convention `flops_per_token` counts attention in.
    """
    if devices < 1:
        raise ValueError(f"devices must be at least 1, got {devices}")
    return None if peak is None else flops_per_token * tokens_per_second / (devices * peak)
