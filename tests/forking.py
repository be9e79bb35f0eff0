"""Fresh interpreters for tests of imports and of crashes: forks of one process that has imported what all would."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# what transformers' models import, and neither transformers, numba nor the package: those are what is tested
PRELOADED = ["numpy", "torch", "torch._dynamo", "torch.distributed", "safetensors.torch", "tokenizers"]
# what most tests of the package import: taken by `Forks.run(.., imports=PACKAGE)`, once a process
PACKAGE = (
    "qmoe_lite.inspection.verification",
    "qmoe_lite.offload.runner",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "transformers.models.switch_transformers.modeling_switch_transformers",
)
SERVER = """
import importlib, json, os, sys, traceback


def serve(tasks, answers):
    others = {}  # servers that have imported more
    for line in tasks:
        task = json.loads(line)
        if modules := tuple(task.pop("imports")):
            if modules not in others:
                others[modules] = server(modules)
            to, back, _ = others[modules]
            print(json.dumps(task | {"imports": []}), file=to, flush=True)
            print(back.readline().strip(), file=answers, flush=True)
            continue
        child = os.fork()
        if child == 0:
            run(task)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
    for to, _, child in others.values():
        to.close()
        os.waitpid(child, 0)


def server(modules):
    (tasks, to), (back, answers) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(to)
        os.close(back)
        for name in modules:
            importlib.import_module(name)
        serve(os.fdopen(tasks), os.fdopen(answers, "w"))
        os._exit(0)
    os.close(tasks)
    os.close(answers)
    return os.fdopen(to, "w"), os.fdopen(back), child


def run(task):
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


for name in sys.argv[1:]:
    importlib.import_module(name)
serve(sys.stdin, sys.stdout)
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

    def run(self, code: str, *arguments: object, imports: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """Run code as `python -c CODE ARGUMENTS` does; an exception, SystemExit too, is exit code 1.

        The process has imported the modules `imports` too; those are imported once.
        """
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        paths = {"out": str(self._out), "err": str(self._err)}
        print(
            json.dumps({"code": code, "arguments": [*map(str, arguments)], "imports": [*imports], **paths}),
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
