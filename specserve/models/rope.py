"""Rotary position embedding (RoPE): reads its parameters and computes its table of angles.

Dimension i is paired with i + head_dim / 2. The table is computed once per model, so the angles of
a position never depend on the batch.
"""

import math
from typing import Final, Literal, get_args

import torch
from msgspec import Struct
from torch import Tensor

from specserve.models.fields import Fields
from specserve.models.known_fields import HARMLESS_ROPE
from specserve.models.memory import check_memory

MAX_POSITIONS: Final = 2**24  # the table is float32, which is exact for integers up to this
RopeKind = Literal["default", "linear", "llama3", "yarn"]


class RopeShape(Struct, frozen=True):
    """Parameters of RoPE (Su et al. 2021, RoFormer) and of its context extension.

    `linear` (Chen et al. 2023) divides positions by `factor`. `llama3` (Llama 3.1) divides the
    frequencies of wavelengths above original_context / `low_freq_factor` by `factor`, keeps those
    below original_context / `high_freq_factor`, and interpolates between. `yarn` is Peng et al.
    2023, section 3.4; `attention_factor` scales cos and sin.
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
    """Read the RoPE parameters from config.json.

    They are in `rope_parameters`, or in the older fields `rope_theta` and `rope_scaling`.
    `max_positions` is the default of the original context. Raises `ModelError` for unsupported
    parameters, or if `rope_parameters` and `rope_scaling` differ.
    """
    names = ("rope_parameters", "rope_scaling")
    sections = [section for section in map(config.section, names) if section.values]
    empty = Fields({}, config.source)
    shapes = [_read_section(config, section, max_positions) for section in sections or [empty]]
    if shapes[0] != shapes[-1]:
        config.fail("rope_scaling", "rope_parameters says something else; remove one of the two")
    return shapes[0]


def _read_section(config: Fields, section: Fields, max_positions: int) -> RopeShape:
    theta = section.number("rope_theta", config.number("rope_theta", 10000.0))
    if theta <= 1.0:
        (section if section.has("rope_theta") else config).fail("rope_theta", "must be above 1")
    for fields in (config, section):
        if fields.number("partial_rotary_factor", 1.0) != 1.0:
            fields.fail("partial_rotary_factor", "only 1.0 (all dimensions) is supported")
    name = "rope_type" if section.has("rope_type") else "type"
    kind = section.get(name, "default")
    if kind not in get_args(RopeKind):
        section.fail(name, f"expected one of {', '.join(get_args(RopeKind))}")
    section.reject_unread(HARMLESS_ROPE.__contains__)
    if kind == "default":
        if not section.has(name) and section.number("factor", 1.0) != 1.0:
            section.fail("factor", "nothing says how it is used; set rope_type, or remove it")
        return RopeShape(theta)
    name = "original_max_position_embeddings"
    original = section.integer(name, max_positions, high=MAX_POSITIONS)
    if kind == "yarn":
        return _read_yarn(section, theta, original, max_positions)
    factor = _factor(section)
    if kind == "linear":
        return RopeShape(theta, "linear", factor)
    low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
    if high - low < 1e-6 * high:
        section.fail("low_freq_factor", f"must be below high_freq_factor ({high:g})")
    return RopeShape(theta, "llama3", factor, original, low, high)


def _factor(section: Fields, default: float | None = None) -> float:
    return section.number("factor", default, low=1e-3, high=1e6)


def rotary_table(rope: RopeShape, head_dim: int, num_positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin of all angles, each [num_positions, head_dim / 2] float32.

    Raises `ModelError` if the tables do not fit in memory.
    """
    check_memory(
        3 * num_positions * head_dim // 2 * torch.float32.itemsize,
        torch.device("cpu"),
        f"max_position_embeddings = {num_positions}: the table of rotary angles",
        "lower it in config.json to the context that is needed",
    )
    frequencies = _inverse_frequencies(rope, head_dim)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    cos = angles.cos().mul_(rope.attention_factor)
    return cos, angles.sin_().mul_(rope.attention_factor)


def _read_yarn(section: Fields, theta: float, original: int, max_positions: int) -> RopeShape:
    factor = _factor(section, max_positions / original)
    if original * factor > MAX_POSITIONS:
        section.fail("factor", f"{original} positions times it are more than {MAX_POSITIONS}")

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0

    weight, weight_all = (
        section.number(name, 0.0, low=0.0, high=1e3) for name in ("mscale", "mscale_all_dim")
    )
    default = mscale(weight) / mscale(weight_all) if weight and weight_all else mscale(1.0)
    return RopeShape(
        theta,
        "yarn",
        factor=factor,
        original_context=original,
        beta_fast=section.number("beta_fast", 32.0),
        beta_slow=section.number("beta_slow", 1.0),
        truncate=section.flag("truncate", True),
        attention_factor=section.number("attention_factor", default, low=1e-3, high=1e3),
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
    """The weight of the unscaled frequency per dimension, before clamping to 0..1.

    It falls linearly from 1 for dimensions that rotate `beta_fast` times within the original
    context to 0 for those that rotate `beta_slow` times.
    """

    def dimension_turning(times: float) -> float:
        reach = rope.original_context / (times * 2 * math.pi)
        return head_dim * math.log(reach) / (2 * math.log(rope.theta))

    low, high = dimension_turning(rope.beta_fast), dimension_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    return 1.0 - (torch.arange(head_dim // 2, dtype=torch.float32) - low) / width
