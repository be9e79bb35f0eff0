"""Tokens through a layer's experts: groups of tokens that share an expert, all of them in one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qmoe_lite.coding.tokens import count_tokens, known_experts
from qmoe_lite.cuda import launch, matmul, windows_product
from qmoe_lite.cuda.gather import Groups, gather
from qmoe_lite.cuda.matmul import decoded_product, in_order
from qmoe_lite.cuda.packets import Packets
from qmoe_lite.cuda.variants import WIDTHS, Variant, WindowVariant, choose_variant, choose_window_variant
from qmoe_lite.cuda.window_packets import WindowPackets

# pairs of token and expert that are all gathered, since then the host need not know how many tokens an expert has:
# beyond, by a model of the time, decoding an expert once for many tokens is worth waiting to know
GATHERED_PAIRS = 4096

Matrices = Packets | WindowPackets  # of one layer all are of one kind


class ExpertsCall:
    """Tokens on their way through a layer's experts, which may take their turns as they arrive on the GPU.

    Each pair of a token and an expert has a row of its own for what it adds, and a token's rows are added at the end:
    the bytes do not depend on the turns, nor, where no expert is decoded, on the other tokens.

    Parameters
    ----------
    first : list of Packets or of WindowPackets
        The projections that take x, one or two (gate and up), of the same shape; all experts of the layer, or slots,
        which other experts may hold besides.
    last : Packets or WindowPackets
        The projection that takes what they put out.
    activation : str or function
        One of `ACTIVATIONS`, of the first projection's results, which the second one's are multiplied by, where both
        `share_x`; or what makes one tensor of the projections' results, in a launch of its own.
    x : float32, float16 or bfloat16 tensor, shape (T, C), contiguous
        On the GPU of the packets.
    index : integer tensor, shape (T, K)
        Experts of each token; a number that is no expert's adds nothing.
    weights : float tensor, shape (T, K)
        What each expert's output is multiplied by.
    experts : int
        Of the layer: `index` goes from 0 to it.

    Attributes
    ----------
    fits : bool
        The GPU's shared memory holds a token of x and of what the first projections put out; else `gather` must not be
        called.
    few : bool
        There are so few pairs that `gather` suits all experts, however many tokens each has.

    Notes
    -----
    Nothing is checked, and the GPU is not waited for, so that a CUDA graph can hold what `gather` and `total` do.
    """

    def __init__(
        self,
        first: Sequence[Matrices],
        last: Matrices,
        activation: str | Callable[[list[Tensor]], Tensor],
        x: Tensor,
        index: Tensor,
        weights: Tensor,
        experts: int,
    ) -> None:
        self._first, self._last, self._activation = first, last, activation
        windows = isinstance(last, WindowPackets)
        self._most_tokens = windows_product.PRODUCT_TOKENS if windows else matmul.GATHERED_TOKENS
        self._x, self._index, self._experts = x, index, experts
        self._weights = weights.float().reshape(-1).contiguous()
        self._y = torch.zeros(index.numel(), last.rows, dtype=torch.float32, device=x.device)
        self._groups: Groups | None = None
        self._order: Tensor | None = None
        name = activation if isinstance(activation, str) else None
        self._stages: list[tuple[Matrices, ...]] = [tuple(first)] if name else [(each,) for each in first]
        wanted = 1 if index.numel() <= 2 * experts else WIDTHS[0]
        half = windows and x.dtype == torch.bfloat16
        self._inside_dtype = torch.bfloat16 if half else torch.float32  # of what the first projections put out
        variants = [_variant(matrices, wanted, name, half) for matrices in self._stages]
        variants.append(_variant((last,), wanted, None, half))
        found = [variant for variant in variants if variant is not None]
        self.fits = len(found) == len(variants)
        most_pairs = min(GATHERED_PAIRS, experts * self._most_tokens) if windows else GATHERED_PAIRS
        self.few = self.fits and index.numel() <= most_pairs
        self._width = min((variant.tokens for variant in found), default=1)
        self._variants: list[Variant | WindowVariant] = [replace(variant, tokens=self._width) for variant in found]

    def gather(self, places: Tensor | None = None) -> None:
        """Send tokens through experts: a launch for the first projections, one for the last.

        Parameters
        ----------
        places : int32 tensor, shape (experts,), optional
            Where each expert lies among the packets, -1 if it has no turn now. By default all have their turn, and each
            lies at its own number.
        """
        if not self._index.numel():
            return
        if self._groups is None:
            if self._width == 1:
                self._groups = single_groups(self._index)
            else:
                self._groups = group_pairs(self._index, self._experts, self._width)
        if places is None:
            places = in_order(self._experts, self._x.device)
        *before, after = self._variants
        outputs = []
        for matrices, variant in zip(self._stages, before, strict=True):
            shape = self._index.numel(), matrices[0].rows
            outputs.append(torch.empty(shape, dtype=self._inside_dtype, device=self._x.device))
            _multiply(matrices, places, variant, self._x, self._groups, self._index.shape[1], None, outputs[-1])
        inside = outputs[0] if isinstance(self._activation, str) else self._activation(outputs).contiguous()
        _multiply((self._last,), places, after, inside, self._groups, 1, self._weights, self._y)

    def turn(self, places: dict[int, int], sizes: Sequence[int], activation: Callable[[list[Tensor]], Tensor]) -> None:
        """Send tokens through some experts: those of few tokens, or all where there are few pairs, without decoding.

        Parameters
        ----------
        places : dict
            Where each of them lies among the packets.
        sizes : list of int
            Tokens of each expert of the layer.
        activation : function
            As `decode` takes it.
        """
        most = self._index.numel() if self.few else self._most_tokens
        few = [expert for expert in places if self.fits and sizes[expert] <= most]
        if few:
            numbers = [-1] * self._experts
            for expert in few:
                numbers[expert] = places[expert]
            self.gather(launch.upload(numbers, self._x.device))
        for expert in [expert for expert in places if expert not in few]:
            before = sum(sizes[:expert])
            self.decode(places[expert], slice(before, before + sizes[expert]), activation)

    def decode(self, place: int, pairs: slice, activation: Callable[[list[Tensor]], Tensor]) -> None:
        """Send many tokens through the expert at a place: its matrices are decoded.

        Parameters
        ----------
        place : int
            Among the packets.
        pairs : slice
            Of the pairs in the order of their experts; those of no expert come last.
        activation : function
            Makes one tensor of the first projections' results.
        """
        if self._order is None:
            self._order = torch.argsort(known_experts(self._index, self._experts), stable=True)
        own = self._order[pairs]
        x = self._x[torch.div(own, self._index.shape[1], rounding_mode="floor")]
        inside = activation([_decoded(each, place, x) for each in self._first])
        out = _decoded(self._last, place, inside)
        self._y.index_copy_(0, own, out.float() * self._weights[own, None])

    def total(self) -> Tensor:
        """Return what all experts that had their turn add up to, float32 (T, rows of the last projection)."""
        return self._y.view(*self._index.shape, self._last.rows).sum(1)


def single_groups(index: Tensor) -> Groups:
    """Return each pair of a token and an expert as a group of its own."""
    pairs = torch.arange(index.numel(), dtype=torch.int32, device=index.device)
    return index.reshape(-1).to(torch.int32), pairs


def group_pairs(index: Tensor, experts: int, width: int) -> Groups:
    """Gather the pairs of each expert in groups of up to `width`, without waiting for the GPU.

    Some of the last groups may be empty: how many are needed is known on the GPU alone.
    """
    pairs = index.numel()
    expert, pair = torch.sort(known_experts(index, experts), stable=True)
    counts = count_tokens(index, experts)
    groups_each = (counts + width - 1) // width
    first_pair, first_group = counts.cumsum(0) - counts, groups_each.cumsum(0) - groups_each
    rank = torch.arange(pairs, device=index.device) - first_pair[expert]
    group = first_group[expert] + rank // width
    most = min(pairs, pairs // width + experts + 1)
    found = torch.full((most,), -1, dtype=torch.int32, device=index.device)
    members = torch.full((most * width,), -1, dtype=torch.int32, device=index.device)
    found[group] = expert.to(torch.int32)
    members[group * width + rank % width] = pair.to(torch.int32)
    return found, members


def share_x(matrices: Sequence[Matrices]) -> bool:
    """Return whether projections can take x in one launch: those from codes of windows need equal column scales."""
    scales = [(each.scales.data_ptr(), each.strides[2]) for each in matrices if isinstance(each, WindowPackets)]
    return len(set(scales)) <= 1


def _variant(
    matrices: tuple[Matrices, ...], tokens: int, activation: str | None, half: bool
) -> Variant | WindowVariant | None:
    packets, limit = matrices[0], launch.shared_limit(matrices[0].device)
    if isinstance(packets, WindowPackets):
        book, *others = (each.dictionary for each in matrices if isinstance(each, WindowPackets))
        other = next(iter(others), None)
        return choose_window_variant(book, packets.columns, tokens, limit, other, activation, half)
    codebooks = tuple(each.codebook for each in matrices if isinstance(each, Packets))
    return choose_variant(codebooks, packets.levels_each, packets.columns, tokens, activation, limit)


def _multiply(
    matrices: tuple[Matrices, ...],
    places: Tensor,
    variant: Variant | WindowVariant,
    x: Tensor,
    groups: Groups,
    slots: int,
    weights: Tensor | None,
    y: Tensor,
) -> None:
    """Fill y (pairs, R), as `gather` or `windows_product.multiply_groups` does."""
    if isinstance(variant, WindowVariant):
        first, *others = (each for each in matrices if isinstance(each, WindowPackets))
        other = next(iter(others), None)
        windows_product.multiply_groups(first, places, variant, x, groups, slots, y, weights, other)
    else:
        own = tuple(each for each in matrices if isinstance(each, Packets))
        gather(own, places, variant, x, groups, slots, weights, y)


def _decoded(matrix: Matrices, place: int, x: Tensor) -> Tensor:
    if isinstance(matrix, WindowPackets):
        return windows_product.tile_product(matrix, place, x)
    return decoded_product(matrix, place, x)
