"""What a loaded model takes along when it is pushed to the hub: the card of its directory."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

_CARD = "README.md"
_TEMPLATE = "This model card has been automatically generated"  # transformers' own, where the repository has none


def carry_card(model: Any, directory: Path) -> None:
    """Let a model's `push_to_hub` put the card of its directory into a repository that has none, if there is one.

    transformers uploads the repository's own card, or one that says nothing; what lies beside the weights it leaves
    behind.
    """
    try:
        card = (directory / _CARD).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return
    if hasattr(model, "_upload_modified_files"):
        model._upload_modified_files = _Upload(model, card)


class _Upload:
    """Stands for a model's `_upload_modified_files`, by which transformers uploads what it has just written."""

    def __init__(self, model: Any, card: str) -> None:
        self._model, self._card = model, card

    def __call__(self, working_dir: Any, *arguments: Any, **options: Any) -> Any:
        file = Path(working_dir) / _CARD
        if not file.exists() or _TEMPLATE in file.read_text(encoding="utf-8"):
            file.write_text(self._with_tags(file), encoding="utf-8")
        return type(self._model)._upload_modified_files(self._model, working_dir, *arguments, **options)

    def _with_tags(self, file: Path) -> str:
        """Return the card with the tags that `push_to_hub` was given."""
        from huggingface_hub import ModelCard

        with suppress(Exception):  # a card that somebody wrote may have any header: it is taken as it is
            asked = ModelCard(file.read_text(encoding="utf-8")).data.get("tags") or []
            card = ModelCard(self._card)
            own = card.data.get("tags") or []
            if more := [tag for tag in asked if tag not in own]:
                card.data["tags"] = [*own, *more]
                return str(card)
        return self._card
