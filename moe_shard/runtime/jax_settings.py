"""Refuse settings of jax under which the layers, Flax, Optax or Orbax do not work."""

from __future__ import annotations

import jax

from moe_shard.errors import UserError

_ARITHMETIC = "this package computes in the dtypes of its keys, with jax's usual promotion"
_MOVED = "batches go to the devices, and checkpoints come from them"
_TRANSFERS = (None, "allow", "log", "log_explicit")
_SETTINGS: dict[str, tuple[tuple[object, ...], str]] = {
    "jax_enable_x64": ((False,), _ARITHMETIC),
    "jax_numpy_rank_promotion": (("allow", "warn"), _ARITHMETIC),
    "jax_numpy_dtype_promotion": (("standard",), _ARITHMETIC),
    "jax_disable_jit": ((False,), "the step is compiled before it runs"),
    "jax_transfer_guard": (_TRANSFERS, _MOVED),
    "jax_transfer_guard_host_to_device": (_TRANSFERS, _MOVED),
    "jax_transfer_guard_device_to_device": (_TRANSFERS, _MOVED),
    "jax_transfer_guard_device_to_host": (_TRANSFERS, _MOVED),
}
"""Settings of jax -> the values under which this package works, and why not under others."""


def refuse_settings_of_jax() -> None:
    """Refuse settings of jax under which the layers, Flax, Optax or Orbax cannot work.

    Raises:
        UserError: there is one.
    """
    for name, (works, why) in _SETTINGS.items():
        found = getattr(jax.config, name)
        if found not in works:
            raise UserError(
                f"{name.upper()}={found}: {why}\nfix: take {name.upper()} out of the environment"
            )
