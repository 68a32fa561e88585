"""Read the layers of multi-token prediction that published checkpoints have after the last one.

Such a layer repeats the head and the embedding, which all layers share. Copies that are equal are
not read, and an export writes them like the others; a layer with its own is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from moe_shard.autoep.head import EMBEDDING_ROLE, HEAD_ROLE, Equal, compare_heads
from moe_shard.autoep.headers import TensorHeader
from moe_shard.autoep.tensor_names import HEAD_COPY, TABLE_COPY, Names
from moe_shard.autoep.tensor_plan import Piece
from moe_shard.config.keys import shown
from moe_shard.config.model_config import ModelConfig
from moe_shard.errors import UserError

MTP_KEY = "mtp_num_layers"


def copies_in_mtp(
    pieces: Sequence[Piece],
    model: ModelConfig,
    names: Names,
    headers: Mapping[str, TensorHeader],
    where: Path,
) -> Iterator[Piece]:
    """Yield the pieces of an MTP layer's tensors that repeat the head or the embedding.

    Args:
        pieces: those of the parameters.
        model: the model; its MTP layers are read.
        names: the tensors by role.
        headers: the tensors' headers; the values of such tensors are compared.
        where: the directory, for messages.

    Raises:
        UserError: such a tensor differs from the head or the embedding.
    """
    head = EMBEDDING_ROLE if model.logits_via_embedding else HEAD_ROLE
    last = model.num_decoder_layers
    for role, original in ((HEAD_COPY, head), (TABLE_COPY, EMBEDDING_ROLE)):
        of = next(piece for piece in pieces if piece.param == tuple(original.split(".")))
        for layer in range(last, last + model.mtp.mtp_num_layers):
            copy = names.roles.get(role, {}).get((layer,))
            if copy is None:
                continue
            if compare_heads(headers[of.tensor], headers[copy]) is Equal.NO:
                raise UserError(
                    f"{where}: {shown(copy)} is not {shown(of.tensor)}, which all layers share "
                    f"here\nfix: {MTP_KEY}=0 carries the layer as it is"
                )
            yield replace(of, tensor=copy)
