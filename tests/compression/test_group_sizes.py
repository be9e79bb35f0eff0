"""How many experts a group takes, and what an allocator keeps of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qmoe_lite.compression import freed
from qmoe_lite.compression.group_sizes import expert_bytes, groups_of
from qmoe_lite.compression.settings import Settings
from qmoe_lite.models.blocks import MoELayer

QWEN3_30B = {"gate_proj": (768, 2048), "up_proj": (768, 2048), "down_proj": (2048, 768)}
C_2048 = {"wi": (6144, 2080), "wo": (2080, 6144)}


def layer_of(shapes, experts=128):
    return MoELayer("model.layers.0.mlp.experts", "model.layers.0", experts, shapes)


def test_an_expert_takes_what_its_largest_stage_holds():
    layer, weights = layer_of(QWEN3_30B), 768 * 2048
    first, last = 8 * 2048 * 2048 + 4 * weights + 2 * 2 * weights, 8 * 768 * 768 + 4 * weights + 3 * 2 * weights
    assert expert_bytes(layer, Settings()) == first
    solved_again = 8 * 2048 * 2048 + last + int(2.3 * 3 * weights)
    assert expert_bytes(layer, Settings(rate=2.0)) == pytest.approx(solved_again, abs=2)
    assert expert_bytes(layer, Settings(recipe="nearest")) == 4 * weights + 3 * 2 * weights
    assert expert_bytes(layer, Settings(device="cuda")) > first


def test_groups_fit_a_gibibyte_on_a_cpu_and_four_on_a_gpu():
    settings = Settings(rate=2.0)
    assert [len(group) for group in groups_of(layer_of(QWEN3_30B), settings)] == [16] * 8
    assert len(groups_of(layer_of(C_2048), settings)[0]) == 2
    assert len(groups_of(layer_of(C_2048), replace(settings, device="cuda"))[0]) == 5
    assert len(groups_of(layer_of(C_2048), replace(settings, group_bytes=1))[0]) == 1
    assert [len(group) for group in groups_of(layer_of(QWEN3_30B, 20), settings)] == [16, 4]


def test_freed_memory_is_returned_where_the_allocator_can(monkeypatch):
    freed.return_freed()
    monkeypatch.setattr(freed, "_trim", lambda: None)
    freed.return_freed()
