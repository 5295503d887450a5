"""A real S3 server for tests, and a TCP proxy that cuts connections."""

from __future__ import annotations

import importlib.util
import select
import socket
import sys
import threading
from pathlib import Path
from types import ModuleType

_SERVER = Path(__file__).parent.parent / "deploy" / "local" / "s3" / "server.py"


def server_module() -> ModuleType:
    """``deploy/local/s3/server.py``, which is a script and in no package; its servers end with the tests."""
    name = "finetune_local_s3_server"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, _SERVER)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        module.S3Server.ends_with_its_starter = True
    return sys.modules[name]


class CuttingProxy:
    """Forwards a port; cuts the first ``cuts`` connections that have carried ``after_bytes`` in one direction."""

    def __init__(self, target_port: int, after_bytes: int, cuts: int, direction: str = "up") -> None:
        self._target = ("127.0.0.1", target_port)
        self._after_bytes = after_bytes
        self._direction = direction
        self._lock = threading.Lock()
        self._left = cuts
        self.cut = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._listener.close()

    def __enter__(self) -> CuttingProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._forward, args=(client,), daemon=True).start()

    def _forward(self, client: socket.socket) -> None:
        carried = {"up": 0, "down": 0}
        with client, socket.create_connection(self._target) as server:
            routes = {client: (server, "up"), server: (client, "down")}
            while True:
                for source in select.select([client, server], [], [])[0]:
                    try:
                        data = source.recv(65536)
                        if not data:
                            return
                        target, direction = routes[source]
                        carried[direction] += len(data)
                        if carried[self._direction] > self._after_bytes and self._take_cut():
                            return
                        target.sendall(data)
                    except OSError:
                        return

    def _take_cut(self) -> bool:
        with self._lock:
            if self._left == 0:
                return False
            self._left -= 1
            self.cut += 1
            return True
