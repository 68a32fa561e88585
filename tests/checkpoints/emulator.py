"""Serve Google Cloud Storage from memory, in a process of its own: `python -m` with a port.

gcp-storage-emulator serves one connection at a time, and leaves out a header of downloads that
tensorstore needs: the generation of the object. Both are added here. Its store in memory is not
made for several threads, so that requests are handled one by one.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BUCKET = "a-bucket"


def environment(port: int) -> dict[str, str]:
    """Return the variables by which the clients of a process find the emulator."""
    address = f"http://127.0.0.1:{port}"
    return {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


@contextmanager
def emulator() -> Iterator[dict[str, str]]:
    """Serve while the block runs, and yield `environment`."""
    port = free_port()
    command = [sys.executable, "-m", "tests.checkpoints.emulator", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            time.sleep(0.05)
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
        else:
            raise TimeoutError("the emulator does not listen")
        yield environment(port)
    finally:
        process.kill()
        process.wait()


def serve(port: int) -> None:
    """Serve until the process is killed."""
    from gcp_storage_emulator import server
    from gcp_storage_emulator.handlers import objects

    download = objects.download

    def with_generation(request: Any, response: Any, storage: Any, *rest: Any) -> None:
        where = request.params["bucket_name"], request.params["object_id"]
        stored = storage.objects.get(where[0], {}).get(where[1])
        if stored:
            response["x-goog-generation"] = stored["generation"]
        download(request, response, storage, *rest)

    handle, one_by_one = server.Router.handle, threading.Lock()

    def handle_alone(router: Any, method: str) -> None:
        with one_by_one:
            handle(router, method)

    server.Router.handle = handle_alone
    objects.download = with_generation
    server.server.HTTPServer = ThreadingHTTPServer
    server.HANDLERS = tuple(
        (path, {k: with_generation if v is download else v for k, v in methods.items()})
        for path, methods in server.HANDLERS
    )
    server.create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET).start()
    threading.Event().wait()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
