"""Standard input, output and error as a shell may hand them over: closed, full, or in an encoding of few characters."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress


def mend_streams() -> None:
    """Make the three streams such that whatever is written to them is no error of ours.

    What is closed reads and writes nothing, and no file that is opened later takes its number, on which libraries
    write. Characters that an encoding lacks are written as escapes; what is called ASCII is read as UTF-8.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            place = os.open(os.devnull, os.O_RDWR)
            if place == number:
                os.set_inheritable(place, True)  # as a shell's are
            setattr(sys, name, os.fdopen(place, "w" if number else "r", encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.encoding.lower() in ("ascii", "us-ascii"):
        sys.stdin.reconfigure(encoding="utf-8")


def give_up_output() -> None:
    """Drop what could not be written to standard output, which Python would try to write again as it ends."""
    with suppress(OSError, ValueError):  # a stream without a descriptor has nothing to drop
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        sys.stdout.flush()
