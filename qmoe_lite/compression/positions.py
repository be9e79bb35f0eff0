"""How long a window of text a model can take."""

from __future__ import annotations

from typing import Any

from qmoe_lite.errors import SettingError

_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")
_GROWS = "dynamic"  # a scaling of rotary angles that follows the text's length


def positions_of(config: Any) -> int | None:
    """Return for how many tokens a model has positions; None where there is no limit.

    Parameters
    ----------
    config : transformers configuration
        Relative positions (an encoder-decoder's), state spaces and attention without positions have no limit, whatever
        number the configuration names; scaled rotary positions reach as far as their factor says.
    """
    if config.is_encoder_decoder:
        return None
    text = config.get_text_config()
    named = [value for name in _NAMES if isinstance(value := getattr(text, name, None), int)]
    if not named or (hasattr(text, "position_embedding_type") and text.position_embedding_type != "rope"):
        return None
    ropes = getattr(text, "rope_parameters", None)
    if not ropes:  # no rotation: only a table of positions, which goes by the other names, could end
        return None if isinstance(getattr(text, _NAMES[0], None), int) else named[0]
    each = [rope for rope in ropes.values() if isinstance(rope, dict)] if "rope_type" not in ropes else [ropes]
    reach = [named[0]]
    for rope in each:
        if rope.get("rope_type") == _GROWS:
            return None
        before = rope.get("original_max_position_embeddings") or named[0]
        reach.append(int(before * (rope.get("factor") or 1)))
    return max(reach)


def check_window(config: Any, sequence_length: int) -> None:
    """Raise SettingError where a model has no positions for windows of so many tokens."""
    positions = positions_of(config)
    if positions is not None and sequence_length > positions:
        raise SettingError(
            f"sequence_length is {sequence_length}; the model has {positions} positions. Use --sequence-length "
            f"{positions} or less."
        )
