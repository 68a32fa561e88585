"""Load ROCm's compiler on a machine without ROCm.

jax's ROCm plugin contains the whole compiler, but links against the ROCm runtime, which the
compiler never calls. Where the runtime is missing, placeholder libraries replace it: they export
the names that the plugin's symbol table imports, and all of them fail when called. `elf.py` reads
that table and writes the libraries.

With ROCm installed none of this is used: the plugin loads the real libraries, nothing is written to
the cache, and `compile` for an AMD target runs the same compiler. If only some of the libraries are
missing, only those are replaced.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from moe_shard.files import cache_folder, write_bytes
from moe_shard.runtime.targets.elf import Function, Imports, placeholder

# Loaded for the lifetime of the process, as any library is.
_loaded: list[ctypes.CDLL] = []


def make_loadable(plugin: Path) -> bool:
    """Make sure that the plugin's library can be loaded into this process.

    Args:
        plugin: the shared library of jax's ROCm plugin.

    Returns:
        Whether placeholders replace libraries of ROCm.

    Raises:
        UserError: the plugin is not a shared library for x86-64.
    """
    if _load(plugin) is not None:
        return False
    imports = Imports.read(plugin)
    present = {name: _load(Path(name)) for name in imports.libraries}
    missing = [name for name, library in present.items() if library is None]
    files = placeholders(missing, imports.functions, [each for each in present.values() if each])
    with tempfile.TemporaryDirectory(prefix="moe_shard-") as temporary:
        folder = _cached(files) or _write(files, Path(temporary))
        # The loader now finds each by the name that the plugin imports.
        _loaded.extend(ctypes.CDLL(str(folder / name)) for name in files)
    return True


def placeholders(
    libraries: Iterable[str], functions: Iterable[Function], present: Iterable[ctypes.CDLL] = ()
) -> dict[str, bytes]:
    """Make libraries that export functions, all of which fail when called.

    Args:
        libraries: names of the libraries to make; not empty.
        functions: functions that they and others must define. One without a version is looked up in
            every library, so all of these go into the first.
        present: libraries that exist; the functions that they define are left out.

    Returns:
        Name -> content of the file.
    """
    exports: dict[str, list[Function]] = {name: [] for name in libraries}
    first = next(iter(exports))
    there = list(present)
    for function in functions:
        if function.version:
            if function.library in exports:
                exports[function.library].append(function)
        elif not any(hasattr(library, function.name) for library in there):
            exports[first].append(function)
    return {name: placeholder(name, wanted) for name, wanted in exports.items()}


def _load(path: Path) -> ctypes.CDLL | None:
    """Load a library; None where it or one that it needs is missing."""
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        # Only missing libraries are replaced; the error of a broken one is passed on.
        if re.search(r"cannot open shared object|No such file", str(error)):
            return None
        raise


def _cached(files: dict[str, bytes]) -> Path | None:
    """Write these files to a folder of the cache; return None where nothing can be written."""
    digest = hashlib.sha256(b"".join(name.encode() + files[name] for name in sorted(files)))
    folder = cache_folder() / f"rocm-placeholders-{digest.hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _write(files, folder)
    except (OSError, RuntimeError):  # RuntimeError: there is no home directory
        return None


def _write(files: dict[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:
            # Another process may be reading it, or writing the same.
            write_bytes(path, content)
    return folder
