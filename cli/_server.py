"""Where the server listens, for whom, and how it ends."""

from __future__ import annotations

import atexit
import ipaddress
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from qmoe_lite.errors import SettingError

if TYPE_CHECKING:
    from qmoe_lite.cli._app import App
    from qmoe_lite.cli._turns import Turns

MOST_CONNECTIONS = 512
LONGEST_END = 1.5  # seconds from Ctrl-C until what still runs is left to itself


def bind(host: str, port: int) -> socket.socket:
    """Take an address and a port; raise SettingError where that cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise SettingError(f"--host {host!r} is no address of this machine: {error}. Try 127.0.0.1.") from error
    taken = socket.socket(family, socket.SOCK_STREAM)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except OSError as error:
        taken.close()
        text = f"{host} port {port} cannot be listened on: {error.strerror}. Choose another --port or --host."
        raise SettingError(text) from error
    return taken


def is_loopback(taken: socket.socket) -> bool:
    """Report whether only this machine reaches the address."""
    return ipaddress.ip_address(taken.getsockname()[0].partition("%")[0]).is_loopback


def url(taken: socket.socket) -> str:
    """Return where clients find the server."""
    host, port = taken.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def check_key(api_key: str) -> None:
    """Raise SettingError for a key that no header can hold."""
    if not api_key or not all("!" <= character <= "~" for character in api_key):
        raise SettingError("the API key is empty, or has characters other than printable ASCII. Choose another one.")


def listen(app: App, turns: Turns, taken: socket.socket, started: Callable[[], object]) -> bool:
    """Serve until Ctrl-C or SIGTERM, both of which are ignored from then on.

    Parameters
    ----------
    app : App
        Answers the clients.
    turns : Turns
        The app's; closed in the end.
    taken : socket
        As `bind` gives it.
    started : function
        Called when clients are answered.

    Returns
    -------
    bool
        Whether all threads have ended; one may be in the middle of something long, such as a kernel's compilation.
    """
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(
            app,
            access_log=False,
            lifespan="off",
            limit_concurrency=MOST_CONNECTIONS,
            log_config=None,
            log_level="critical",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=1,
            ws="none",
        )
    )
    stop = threading.Event()

    def serve() -> None:
        try:
            server.run(sockets=[taken])
        finally:
            stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    thread = threading.Thread(target=serve, name="qmoe-http", daemon=True)
    thread.start()
    while not server.started and not stop.wait(0.01):
        pass
    if server.started:
        started()
    stop.wait()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end = time.monotonic() + LONGEST_END
    server.should_exit = True
    ended = turns.close(timeout=LONGEST_END)
    thread.join(max(0.0, end - time.monotonic()))
    return ended and not thread.is_alive()


def leave() -> None:
    """End the program with exit code 0, without the seconds in which Python takes torch and transformers apart."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(0)
