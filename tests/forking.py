"""Fresh interpreters for tests of imports and of crashes: forks of one process that has imported what all would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

# what transformers' models import, and neither transformers, numba nor the package: those are what is tested
PRELOADED = ["numpy", "torch", "torch._dynamo", "torch.distributed", "safetensors.torch", "tokenizers"]
SERVER = """
import importlib, json, os, sys, traceback

for name in sys.argv[1:]:
    importlib.import_module(name)
for line in sys.stdin:
    task = json.loads(line)
    child = os.fork()
    if child == 0:
        for stream, path in ((1, task["out"]), (2, task["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
        sys.argv = ["-c", *task["arguments"]]
        code = 0
        try:
            exec(compile(task["code"], "<string>", "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forks:
    """A process that forks for each piece of code that it is given; it has imported `PRELOADED`.

    Parameters
    ----------
    folder : Path
        For what the forks print.
    """

    def __init__(self, folder: Path) -> None:
        self._out, self._err = folder / "out", folder / "err"
        command = [sys.executable, "-c", SERVER, *PRELOADED]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run code as `python -c CODE ARGUMENTS` does; an exception, SystemExit too, is exit code 1."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        paths = {"out": str(self._out), "err": str(self._err)}
        print(
            json.dumps({"code": code, "arguments": [*map(str, arguments)], **paths}),
            file=self._server.stdin,
            flush=True,
        )
        exit_code = int(self._server.stdout.readline())
        printed, noted = (path.read_text(encoding="utf-8") for path in (self._out, self._err))
        self._out.unlink()
        self._err.unlink()
        return subprocess.CompletedProcess(code, exit_code, printed, noted)

    def close(self) -> None:
        """End the process."""
        self._server.communicate()
