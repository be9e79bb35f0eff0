"""What `qmoe compress` says before it starts, or refuses; and where it was when it was interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qmoe_lite.cli import _output
from qmoe_lite.cli.estimate import brief
from qmoe_lite.compression.settings import Progress
from qmoe_lite.errors import QMoEError, SettingError
from qmoe_lite.inspection.estimation import Estimate, estimate

_NO_MATTER = ("stop_when_bad", "check_first", "codeword_bits", "dampening", "seed")


class Beforehand:
    """Stands between a run and its display.

    Parameters
    ----------
    model : str
        Of the command.
    out : Path
        Of the command.
    settings : dict
        Of the command, as `compress` takes them.
    shown : callable
        Displays progress.
    show : bool
        Whether to print what the run will take; where it cannot fit, it is refused all the same.

    Attributes
    ----------
    last : Progress or None
        Of the last finished group.
    """

    def __init__(
        self, model: str, out: Path, settings: dict[str, Any], shown: Callable[[Progress], None], show: bool
    ) -> None:
        self._model, self._out, self._shown, self._show = model, out, shown, show
        self._settings = {name: value for name, value in settings.items() if name not in _NO_MATTER}
        self.last: Progress | None = None

    def __call__(self, event: Progress) -> None:
        """Pass an event of a run on."""
        if event.group is not None:
            self.last = event
        self._shown(event)

    def begin(self, samples: int | None) -> None:
        """Say what a run will take.

        Parameters
        ----------
        samples : int or None
            For calibration: a text may have fewer than were asked for.

        Raises
        ------
        SettingError
            It cannot fit.
        """
        if samples is not None:
            self._settings["samples"] = samples
        try:
            found: Estimate = estimate(self._model, out=self._out, measuring=False, **self._settings)
        except QMoEError:  # the run itself has opened the model: what the estimate does not know is not its end
            return
        if found.compressing.obstacles:
            raise SettingError(f"{self._out} cannot be made here: {' '.join(found.compressing.obstacles)}")
        if self._show:
            for line in brief(found):
                _output.note(f"qmoe: {line}")
        for doubt in found.compressing.doubts:
            _output.note(f"qmoe: warning: {doubt}")
