"""Configure the gated delta net (arXiv 2412.06464), a token mixer in place of attention."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from moe_shard.config.keys import MOST_SIZE, Key, check_leaves, divisors
from moe_shard.errors import UserError

MOST_TAPS = 64  # far above any model; each tap is one shifted product
MOST_CHUNK = 1024  # tokens; the scores of a chunk are this, squared, for each head


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaConfig:
    """Describe the gated delta net of the layers that have it. Sizes count elements.

    >>> import moe_shard as ms
    >>> ms.load_config("mixtral-tiny", ["gdn_num_key_heads=8"]).model.delta.values_per_key
    4

    Attributes:
        gdn_num_key_heads: J, heads of queries and keys.
        gdn_num_value_heads: N, heads of values, each with a state of its own; J divides it.
        gdn_key_head_dim: D, elements of a query and of a key.
        gdn_value_head_dim: Dv, elements of a value.
        gdn_conv_kernel_dim: K, taps of the causal convolution over queries, keys and values.
        gdn_chunk_size: C, tokens that are computed at once in training; a power of two. It decides
            time and memory, not the result.
        use_qk_norm_in_gdn: whether queries and keys are divided by their lengths.

    Raises:
        UserError: on a value out of range or a contradiction between keys.
    """

    gdn_num_key_heads: Annotated[int, Key(least=1, most=2**16)] = 16
    gdn_num_value_heads: Annotated[int, Key(least=1, most=2**16)] = 32
    gdn_key_head_dim: Annotated[int, Key(least=1, most=MOST_SIZE)] = 128
    gdn_value_head_dim: Annotated[int, Key(least=1, most=MOST_SIZE)] = 128
    gdn_conv_kernel_dim: Annotated[int, Key(least=1, most=MOST_TAPS)] = 4
    gdn_chunk_size: Annotated[int, Key(least=1, most=MOST_CHUNK)] = 64
    use_qk_norm_in_gdn: Annotated[bool, Key()] = True

    def __post_init__(self) -> None:
        check_leaves(self)
        if self.gdn_num_value_heads % self.gdn_num_key_heads:
            raise UserError(
                f"gdn_num_value_heads={self.gdn_num_value_heads} is not a multiple of "
                f"gdn_num_key_heads={self.gdn_num_key_heads}: every key serves as many values\n"
                f"fix: gdn_num_key_heads one of {divisors(self.gdn_num_value_heads)}"
            )
        if self.gdn_chunk_size & (self.gdn_chunk_size - 1):
            raise UserError(
                f"gdn_chunk_size={self.gdn_chunk_size} is not a power of two, and a chunk is "
                "solved by halves\nfix: gdn_chunk_size=64, for example"
            )

    @property
    def values_per_key(self) -> int:
        """Return R, the value heads that share a key head."""
        return self.gdn_num_value_heads // self.gdn_num_key_heads
