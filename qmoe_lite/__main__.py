"""`python -m qmoe_lite` is `qmoe`."""

from __future__ import annotations

from qmoe_lite.cli.main import main

if __name__ == "__main__":
    main()
