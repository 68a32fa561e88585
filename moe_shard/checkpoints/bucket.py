"""Read and write objects of a bucket of Google Cloud Storage, and say why that cannot be.

Orbax writes the arrays of a checkpoint itself; this is for everything around them. The client comes
with the extra `gcs`, is loaded when a bucket is asked for, and needs no jax.
"""

from __future__ import annotations

import errno
import importlib.util
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from moe_shard.errors import UserError, first_line

SCHEME = "gs://"
COMMITTED = "commit_success.txt"
"""Orbax's marker of a checkpoint that is complete."""
_PROBE_S, _TRY_S = 10.0, 4.0
"""Seconds that the first look at a bucket may take, and one request of it with its retries."""
_PATIENCE_S, _REQUEST_S = 60.0, (5.0, 30.0)
"""Seconds of any later request with its retries, and of one try (to connect, to read)."""
_THREADS = 8

_ROLES = "storage.objectUser and storage.legacyBucketReader"
_LOGIN = (
    "gcloud auth application-default login, or GOOGLE_APPLICATION_CREDENTIALS=the key of a service "
    "account"
)


@dataclass(frozen=True)
class StoredObject:
    """Describe an object as the bucket does, which checks what it stores.

    Attributes:
        size: its bytes.
        sums: checksums of its content. MD5 is among them, as the CRC32C of Orbax's files says
            little: they end with their own, by which that of the whole is always the same.
        written: when it was, in seconds since 1970.
    """

    size: int
    sums: str
    written: float = field(compare=False)


def is_address(path: object) -> bool:
    """Return whether a path is one in a bucket."""
    return str(path).startswith(SCHEME)


class Bucket:
    """Read and write objects below an address, `gs://BUCKET/PATH`.

    What fails raises OSError with the reason as its `strerror`; a missing object is a
    FileNotFoundError.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self.name, _, path = self.address.removeprefix(SCHEME).partition("/")
        self._prefix = f"{path}/" if path else ""

    @cached_property
    def _bucket(self) -> Any:
        from google.cloud import storage

        return storage.Client().bucket(self.name)

    def reach(self, *, writes: bool = True) -> None:
        """See that the bucket is there and may be used; in seconds, not minutes.

        Args:
            writes: whether something is to be written.

        Raises:
            UserError: it cannot be, with the reason.
        """
        if not all(map(_is_installed, ("gcsfs", "google.cloud.storage"))):
            raise UserError(
                f"{self.address}: buckets need the packages gcsfs and google-cloud-storage\n"
                "fix: pip install 'moe_shard[gcs]', or base_output_directory=a folder"
            )
        failed: list[Exception] = []

        def probe() -> None:
            try:
                self._probe(writes)
            except Exception as error:  # of several libraries, named below
                failed.append(error)

        # In a thread, as the search for credentials has time limits of its own, which add up.
        thread = threading.Thread(target=probe, daemon=True)
        thread.start()
        thread.join(_PROBE_S)
        if thread.is_alive():
            failed.append(TimeoutError(f"no response in {_PROBE_S:g} s"))
        if failed:
            what, fix = _reason(failed[0], self.name)
            raise UserError(f"{self.address}: {what}\nfix: {fix}") from failed[0]

    def _probe(self, writes: bool) -> None:
        from google.cloud.storage.retry import DEFAULT_RETRY

        limits = {"timeout": _TRY_S, "retry": DEFAULT_RETRY.with_timeout(_TRY_S)}
        bucket = self._bucket.client.get_bucket(self.name, **limits)  # Orbax asks for it as well
        if not writes:
            next(iter(bucket.list_blobs(prefix=self._prefix, max_results=1, **limits)), None)
            return
        blob = bucket.blob(f"{self._prefix}.probe-{uuid.uuid4().hex[:12]}")
        blob.upload_from_string(b"", **limits)
        blob.delete(**limits)

    def listed(self, path: str = "") -> tuple[dict[str, StoredObject], list[str]]:
        """List what is directly in a folder: its objects, and the names of its folders."""
        prefix = self._key(path, "/") if path else self._prefix
        with self._failing(path):
            found = self._bucket.list_blobs(prefix=prefix, delimiter="/", **_limits())
            objects = {blob.name.removeprefix(prefix): _stored(blob) for blob in found}
            folders = [each.removeprefix(prefix).rstrip("/") for each in found.prefixes]
        objects.pop("", None)  # what some tools make in place of a folder
        return objects, sorted(folders)

    def checkpoints(self) -> tuple[list[str], list[str]]:
        """Return the names of the folders, and those of them that have Orbax's marker."""
        folders = self.listed()[1]
        numbers = [each for each in folders if each.isdecimal()]
        return folders, [each for each in numbers if COMMITTED in self.listed(each)[0]]

    def find(self, path: str) -> dict[str, StoredObject]:
        """List all objects below a folder."""
        prefix = self._key(path, "/")
        with self._failing(path):
            found = self._bucket.list_blobs(prefix=prefix, **_limits())
            objects = {blob.name.removeprefix(prefix): _stored(blob) for blob in found}
        objects.pop("", None)
        return objects

    def read(self, path: str) -> bytes:
        """Read an object."""
        with self._failing(path):
            content: bytes = self._bucket.blob(self._key(path)).download_as_bytes(**_limits())
        return content

    def write(self, path: str, content: bytes) -> None:
        """Write an object; a reader sees all of it or what was there before."""
        with self._failing(path):
            self._bucket.blob(self._key(path)).upload_from_string(content, **_limits())

    def remove(self, paths: Iterable[str]) -> None:
        """Remove objects; those that are gone already are fine."""

        def one(path: str) -> None:
            with suppress(FileNotFoundError), self._failing(path):
                self._bucket.blob(self._key(path)).delete(**_limits())

        _each(one, paths)

    def copy(self, paths: Iterable[tuple[str, str]]) -> None:
        """Copy objects, (from, to), inside the bucket."""

        def one(ends: tuple[str, str]) -> None:
            with self._failing(ends[0]):
                source, target = (self._bucket.blob(self._key(end)) for end in ends)
                token: str | None = ""
                while token is not None:  # large ones in parts
                    token, _, _ = target.rewrite(source, token=token or None, **_limits())

        _each(one, paths)

    def _key(self, path: str, end: str = "") -> str:
        return f"{self._prefix}{path.strip('/')}{end}"

    @contextmanager
    def _failing(self, path: str) -> Iterator[None]:
        """Raise OSError for whatever the client raises."""
        try:
            yield
        except Exception as error:
            from google.api_core.exceptions import NotFound

            where = f"{self.address}/{path}"
            if isinstance(error, NotFound):
                raise FileNotFoundError(errno.ENOENT, "not in the bucket", where) from error
            raise OSError(errno.EIO, _reason(error, self.name)[0], where) from error


def _limits() -> dict[str, Any]:
    from google.cloud.storage.retry import DEFAULT_RETRY

    return {"timeout": _REQUEST_S, "retry": DEFAULT_RETRY.with_timeout(_PATIENCE_S)}


def _each(work: Callable[[Any], None], items: Iterable[Any]) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(work, items))


def _stored(blob: Any) -> StoredObject:
    sums = f"crc32c={blob.crc32c} md5={blob.md5_hash}"
    return StoredObject(int(blob.size), sums, blob.updated.timestamp())


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _reason(error: Exception, bucket: str) -> tuple[str, str]:
    """Return why a bucket refuses, and the fix."""
    from google.api_core import exceptions as api
    from google.auth import exceptions as auth

    if isinstance(error, api.RetryError) and isinstance(error.cause, Exception):
        error = error.cause
    if isinstance(error, api.NotFound):
        return (
            f"there is no bucket {bucket!r}",
            f"gcloud storage buckets create {SCHEME}{bucket}, or the name of one that is there",
        )
    if isinstance(error, api.Forbidden):
        said = first_line(error.message, 160)
        return f"not permitted: {said}", f"the roles {_ROLES} on the bucket, for this account"
    if isinstance(error, auth.DefaultCredentialsError):
        return "no credentials of Google Cloud are found", _LOGIN
    if isinstance(error, (auth.GoogleAuthError, api.Unauthorized)):
        return f"the credentials are refused: {first_line(error, 120)}", _LOGIN
    if isinstance(error, OSError) and "roject was not passed" in str(error):
        return "no project of Google Cloud is known", "GOOGLE_CLOUD_PROJECT=the bucket's project"
    if isinstance(error, (api.GoogleAPICallError, TimeoutError)):
        why = first_line(error, 120)
    else:
        why = first_line(getattr(error, "reason", None) or _innermost(error), 120)
    return f"it cannot be reached: {why}", "the network of this machine; the same command then"


def _innermost(error: BaseException) -> BaseException:
    """Return what is below the wrappings of the HTTP libraries."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    return getattr(error, "reason", None) or error
