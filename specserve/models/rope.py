"""Rotary position embedding: its parameters from config.json and its table of angles.

The half-rotation form: dimension i pairs with i + head_dim / 2. The table is float32 and computed
once, so a position's angles never depend on the batch.
"""

import math
from typing import Literal, get_args

import torch
from msgspec import Struct
from torch import Tensor

from specserve.models.fields import Fields

RopeKind = Literal["default", "linear", "llama3", "yarn"]


class RopeShape(Struct, frozen=True):
    """Su et al. 2021 (RoFormer), with the context extensions in use.

    `linear`: Chen et al. 2023, positions divided by `factor`. `llama3`: Llama 3.1's smoothing
    between the two wavelengths. `yarn`: Peng et al. 2023, section 3.4; `attention_factor` scales
    cos and sin.
    """

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    original_context: int = 0  # positions before the extension
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


def read_rope(config: Fields, max_positions: int) -> RopeShape:
    """`rope_parameters`, or the older `rope_theta` beside `rope_scaling`.

    Raises `ModelError` for kinds and forms the model cannot run.
    """
    name = "rope_parameters" if config.has("rope_parameters") else "rope_scaling"
    section = config.section(name)
    theta = section.number("rope_theta", config.number("rope_theta", 10000.0))
    if theta <= 1.0:
        (section if section.has("rope_theta") else config).fail("rope_theta", "must be above 1")
    for fields in (config, section):
        if fields.number("partial_rotary_factor", 1.0) != 1.0:
            fields.fail("partial_rotary_factor", "only 1.0 (all dimensions) is supported")
    kind = section.values.get("rope_type", section.values.get("type", "default"))
    if kind not in get_args(RopeKind):
        config.fail(name, f"rope type {kind!r} is not one of {', '.join(get_args(RopeKind))}")
    if kind == "default":
        return RopeShape(theta)
    original = section.integer("original_max_position_embeddings", max_positions)
    if kind == "yarn":
        return _read_yarn(section, theta, original, max_positions)
    factor = section.number("factor")
    if kind == "linear":
        return RopeShape(theta, "linear", factor=factor)
    low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
    if low >= high:
        section.fail("low_freq_factor", f"must be below high_freq_factor ({high:g})")
    return RopeShape(
        theta,
        "llama3",
        factor=factor,
        original_context=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def rotary_table(rope: RopeShape, head_dim: int, num_positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, each [num_positions, head_dim / 2] float32."""
    frequencies = _inverse_frequencies(rope, head_dim)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor


def _read_yarn(section: Fields, theta: float, original: int, max_positions: int) -> RopeShape:
    factor = section.number("factor", max_positions / original)

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0

    if section.has("mscale") and section.has("mscale_all_dim"):
        default = mscale(section.number("mscale")) / mscale(section.number("mscale_all_dim"))
    else:
        default = mscale(1.0)
    return RopeShape(
        theta,
        "yarn",
        factor=factor,
        original_context=original,
        beta_fast=section.number("beta_fast", 32.0),
        beta_slow=section.number("beta_slow", 1.0),
        truncate=section.flag("truncate", True),
        attention_factor=section.number("attention_factor", default),
    )


def _inverse_frequencies(rope: RopeShape, head_dim: int) -> Tensor:  # [head_dim / 2] float32
    plain = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    match rope.kind:
        case "default":
            return plain
        case "linear":
            return plain / rope.factor
        case "llama3":
            wavelengths = 2 * math.pi / plain
            keep = (rope.original_context / wavelengths - rope.low_freq_factor) / (
                rope.high_freq_factor - rope.low_freq_factor
            )
        case "yarn":
            keep = _yarn_keep(rope, head_dim)
    keep = keep.clamp(0.0, 1.0)
    return (1.0 - keep) * plain / rope.factor + keep * plain


def _yarn_keep(rope: RopeShape, head_dim: int) -> Tensor:  # [head_dim / 2] float32
    """1 where a dimension turns often enough to keep its frequency, falling linearly to 0."""

    def dimension_turning(times: float) -> float:
        reach = rope.original_context / (times * 2 * math.pi)
        return head_dim * math.log(reach) / (2 * math.log(rope.theta))

    low, high = dimension_turning(rope.beta_fast), dimension_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    return 1.0 - (torch.arange(head_dim // 2, dtype=torch.float32) - low) / width
