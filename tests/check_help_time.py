"""`qmoe --help` must answer in half a second: the median of five runs, the first one not counted."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import time

LIMIT = 0.5  # seconds


def main() -> int:
    qmoe = shutil.which("qmoe")
    if qmoe is None:
        sys.exit("qmoe is not installed")
    seconds = []
    for _ in range(6):
        begun = time.perf_counter()
        subprocess.run([qmoe, "--help"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - begun)
    median = statistics.median(seconds[1:])
    sys.stdout.write(f"qmoe --help: {median:.3f} s\n")
    return int(median > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
