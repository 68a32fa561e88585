"""Check a `base_output_directory` that is an address: where checkpoints can be written to."""

from __future__ import annotations

import re

from moe_shard.config.keys import shown
from moe_shard.errors import UserError

_GOOGLE = "gs"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_PATH = re.compile(r"[A-Za-z0-9._=+@, -]+")
"""What no tool on the way reads as a pattern, a query or a folder above."""
_OTHERS = {
    "s3": ("Orbax 0.12 writes none to Amazon S3", "Mountpoint or s3fs-fuse"),
    "az": ("Orbax 0.12 writes none to Azure", "blobfuse2"),
    "abfs": ("Orbax 0.12 writes none to Azure", "blobfuse2"),
    "hf": ("Orbax 0.12 writes none to the Hugging Face Hub", "hf-mount"),
}


def check_output(path: str, run_name: str) -> None:
    """Refuse an address that no checkpoint can be written to; a folder is fine.

    Args:
        path: `base_output_directory`.
        run_name: `run_name`.

    Raises:
        UserError: names the reason and the fix.
    """
    scheme, colon, rest = path.partition("://")
    if not colon:
        return
    what = f"base_output_directory={shown(path)}"
    if scheme != _GOOGLE:
        why, by = _OTHERS.get(
            scheme, (f"no checkpoint is written to {scheme[:20]}://", "a tool of its own")
        )
        raise UserError(
            f"{what}: {why}\nfix: gs://BUCKET/PATH, or a folder where the bucket is mounted ({by})"
        )
    bucket, _, folders = rest.rstrip("/").partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise UserError(
            f"{what}: {shown(bucket)} is not the name of a bucket\nfix: gs://BUCKET/PATH"
        )
    for part in (*(folders.split("/") if folders else ()), run_name):
        if not _PATH.fullmatch(part) or part in {".", ".."}:
            raise UserError(
                f"{what}: {shown(part)} cannot be part of an address\n"
                "fix: letters, digits and . _ - in the path and in run_name"
            )
