"""Positions: learned embeddings, or rotations of queries and keys (RoPE), extended by YaRN or as in Llama 3.1.

Learned absolute embeddings are added to those of tokens (Radford et al. 2018, section 4.1). Rotary positions (Su et al.
2021, section 3.2) rotate each pair of channels of queries and keys by an angle proportional to the position, so that
their products depend on distances only. YaRN (Peng et al. 2023, section 3.4) interpolates the low frequencies, and so
does Llama 3.1 (its released code; The Llama 3 Herd of Models, 2024, has no formula), by another ramp and without YaRN's
attention factor.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from gptjax.config import GPTConfig

Rotation = tuple[jax.Array, jax.Array]  # cosines and sines, float32 (B or 1, T, 1, K / 2)


def rotation(config: GPTConfig, positions_BT: jax.Array) -> Rotation | None:
    """The rotation of queries and keys at these positions; None with learned positions.

    YaRN's attention factor is in it, so that scores have the factor twice (Peng et al. 2023, equation 21).
    """
    if config.positions != "rotary":
        return None
    angle_BT1K = positions_BT.astype(jnp.float32)[:, :, None, None] * frequencies(config)[None, None, None]
    factor = attention_factor(config)
    return factor * jnp.cos(angle_BT1K), factor * jnp.sin(angle_BT1K)


def rotate(x_BTHK: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates the channel pairs (i, i + K / 2) of queries or keys, in float32; the result has their dtype."""
    cos_BT1K, sin_BT1K = rotation
    first_BTHK, second_BTHK = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    rotated = (
        first_BTHK * cos_BT1K - second_BTHK * sin_BT1K,
        second_BTHK * cos_BT1K + first_BTHK * sin_BT1K,
    )
    return jnp.concatenate(rotated, axis=-1).astype(x_BTHK.dtype)


def frequencies(config: GPTConfig) -> npt.NDArray[np.float32]:
    """Angles per position of the K / 2 channel pairs, in radians: theta^(-2i / K), interpolated by an extension.

    YaRN keeps frequencies that rotate more than beta_fast times within the original context, divides by `yarn_factor`
    those that rotate less than beta_slow times, and interpolates linearly in i between both. Llama 3.1 interpolates
    linearly in the number of rotations.

    All is rounded to float32, as in the programs that published models were trained with: at position 10^5, other
    roundings of a frequency change its angle by 0.03.
    """
    width = config.head_dim
    exponent = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    wavelength = np.float32(config.rope_theta) ** exponent  # divided by 2 pi
    kept: npt.NDArray[np.float32] = np.reciprocal(wavelength)
    if config.llama3_factor is not None:
        return _llama3(config, kept)
    if config.yarn_factor is None:
        return kept

    def pair_rotating(times: float) -> float:
        """The index i, a real number, of the pair that rotates so many times within the original context."""
        ratio = config.yarn_original_context / (times * 2 * math.pi)
        return width * math.log(ratio) / (2 * math.log(config.rope_theta))

    low, high = pair_rotating(config.yarn_beta_fast), pair_rotating(config.yarn_beta_slow)
    if config.yarn_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high = low + 0.001 if high == low else high
    index = np.arange(width // 2, dtype=np.float32)
    kept_share = 1 - np.clip((index - np.float32(low)) / np.float32(high - low), 0, 1)
    interpolated = 1 / (np.float32(config.yarn_factor) * wavelength)
    return interpolated * (1 - kept_share) + kept * kept_share


def _llama3(config: GPTConfig, kept: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The frequencies of Llama 3.1, from those without an extension."""
    low, high = np.float32(config.llama3_low_rotations), np.float32(config.llama3_high_rotations)
    rotations = np.float32(config.llama3_original_context) / (np.float32(2 * math.pi) / kept)
    kept_share = np.clip((rotations - low) / (high - low), 0, 1)
    return (1 - kept_share) * kept / np.float32(config.llama3_factor) + kept_share * kept


def attention_factor(config: GPTConfig) -> float:
    """The factor of cosines and sines: 1 without YaRN (Peng et al. 2023, equation 22)."""
    if config.yarn_factor is None:
        return 1.0
    if config.yarn_attention_factor is not None:
        return config.yarn_attention_factor
    return 0.1 * math.log(config.yarn_factor) + 1 if config.yarn_factor > 1 else 1.0
