"""Turn whatever Orbax and tensorstore raise for damaged files into errors that name them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from moe_shard.checkpoints.place import DAMAGED
from moe_shard.errors import UserError, first_line

# Orbax logs every phase of a save as information, some of it as warnings, and a save that fails
# with its traceback, several times; what of it matters is said by this package.
logging.getLogger("absl").setLevel(logging.CRITICAL)


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Turn errors of reading in the block into errors that name what is read.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError:
        raise  # of the device: out of memory, for one
    except Exception as error:  # tensorstore and Orbax raise bare ones for damaged files
        raise UserError(
            f"cannot read the checkpoint {checkpoint}: {first_line(error)}\n"
            f"fix: rename it to {checkpoint.name}{DAMAGED} to continue from the one before it, "
            "or import anew"
        ) from error
