"""Configure the token mixers of convolutions: Mamba-2 (arXiv 2405.21060), and LFM2's short one."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from moe_shard.config.delta_config import MOST_CHUNK, MOST_TAPS
from moe_shard.config.keys import MOST_SIZE, Key, check_leaves, divisors
from moe_shard.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """Describe the state space of layers whose mixer is "mamba2". Sizes count elements.

    >>> import moe_shard as ms
    >>> ms.load_config("mixtral-tiny", ["mixer_pattern=[mamba2]"]).model.mamba.heads_per_group
    32

    Attributes:
        mamba_num_heads: heads, each with a state of its own.
        mamba_head_dim: P, elements of a head's values.
        mamba_expand: elements of all heads' values over the model dim, where `mamba_head_dim` is
            not given.
        mamba_num_groups: G, groups of heads that share keys and queries (B and C in the paper);
            divides `mamba_num_heads`.
        mamba_state_dim: D, elements of a key and of a query.
        mamba_conv_kernel_dim: K, taps of the causal convolution over values, keys and queries.
        mamba_conv_bias: whether that convolution has a bias.
        mamba_proj_bias: whether the projections have biases.
        mamba_chunk_size: Q, tokens that are computed at once in training. It decides time and
            memory, not the result.
        mamba_step_min: least step (dt in the paper).
        mamba_step_max: largest step; -1: no limit.

    Raises:
        UserError: on a value out of range or a contradiction between keys.
    """

    mamba_num_heads: Annotated[int, Key(least=1, most=2**16)] = 32
    mamba_head_dim: Annotated[int, Key(least=1, most=MOST_SIZE)] = 64
    mamba_expand: Annotated[int, Key(least=1, most=2**10)] = 2
    mamba_num_groups: Annotated[int, Key(least=1, most=2**16)] = 1
    mamba_state_dim: Annotated[int, Key(least=1, most=MOST_SIZE)] = 128
    mamba_conv_kernel_dim: Annotated[int, Key(least=1, most=MOST_TAPS)] = 4
    mamba_conv_bias: Annotated[bool, Key()] = True
    mamba_proj_bias: Annotated[bool, Key()] = False
    mamba_chunk_size: Annotated[int, Key(least=1, most=MOST_CHUNK)] = 256
    mamba_step_min: Annotated[float, Key(least=0)] = 0.0
    mamba_step_max: Annotated[float, Key(above=0, off=-1)] = -1.0

    def __post_init__(self) -> None:
        check_leaves(self)
        if self.mamba_num_heads % self.mamba_num_groups:
            raise UserError(
                f"mamba_num_heads={self.mamba_num_heads} is not a multiple of "
                f"mamba_num_groups={self.mamba_num_groups}: every group has as many heads\n"
                f"fix: mamba_num_groups one of {divisors(self.mamba_num_heads)}"
            )
        if self.mamba_step_max != -1 and self.mamba_step_max < self.mamba_step_min:
            raise UserError(
                f"mamba_step_max={self.mamba_step_max:g} is below "
                f"mamba_step_min={self.mamba_step_min:g}\nfix: mamba_step_max=-1, for no limit"
            )

    @property
    def heads_per_group(self) -> int:
        """Return R, the heads that share a group's keys and queries."""
        return self.mamba_num_heads // self.mamba_num_groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShortConvConfig:
    """Describe the convolution of layers whose mixer is "short_convolution" (LFM2).

    Attributes:
        short_conv_kernel_dim: K, taps of the causal convolution.
        short_conv_bias: whether the convolution and the projections have biases.

    Raises:
        UserError: on a value out of range.
    """

    short_conv_kernel_dim: Annotated[int, Key(least=1, most=MOST_TAPS)] = 3
    short_conv_bias: Annotated[bool, Key()] = False

    def __post_init__(self) -> None:
        check_leaves(self)
