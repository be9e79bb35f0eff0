"""Several vectors of sums in registers as one Numba value, and the steps of the windows product that add to them.

`Sums` are the sums of some tokens (a codeword is multiplied by each token's activations) or of some rows (each row's
weight is multiplied by the activations of all tokens). LLVM takes them apart and keeps each vector in registers; the
numbers of vectors and of their lanes are lengths of tuples, which the compiler knows. Addresses are uint64 and nothing
is checked, as in `qmoe_lite.coding.vectors`.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

from qmoe_lite.coding.vectors import Vector

_FLOAT, _INT8, _INT32, _INT64 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)


class Sums(types.Type):
    """Numba's type of `count` vectors of `lanes` float32 each."""

    def __init__(self, count: int, lanes: int) -> None:
        self.count, self.lanes = count, lanes
        super().__init__(name=f"Sums({count}, {lanes})")


@register_model(Sums)
class _SumsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Sums) -> None:
        super().__init__(manager, kind, ir.ArrayType(ir.VectorType(_FLOAT, kind.lanes), kind.count))


def _load(builder: Any, address: Any, kind: ir.Type, align: int) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def _multiply_add(builder: Any, left: Any, right: Any, total: Any) -> Any:
    kind = total.type
    name = f"llvm.fma.v{kind.count}f32"
    fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name)
    return builder.call(fma, [left, right, total])


def _digits(builder: Any, address: Any, lanes: int) -> Any:
    """Digits of a table entry as float32."""
    digits = _load(builder, address, ir.VectorType(_INT8, lanes), lanes)
    return builder.sitofp(builder.sext(digits, ir.VectorType(_INT32, lanes)), ir.VectorType(_FLOAT, lanes))


@intrinsic
def digits_at(typing: Any, lanes: Any, address: Any) -> Any:
    """Return int8 digits at an address, as many as the tuple `lanes` is long and aligned so, as a float32 vector."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _digits(builder, arguments[1], lanes.count)

    return Vector(lanes.count)(lanes, types.uint64), generate


@intrinsic
def no_sums(typing: Any, count: Any, lanes: Any) -> Any:
    """Return zeros: as many vectors as the tuple `count` is long, as many lanes as `lanes` is."""
    kind = Sums(count.count, lanes.count)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(ir.ArrayType(ir.VectorType(_FLOAT, kind.lanes), kind.count), None)

    return kind(count, lanes), generate


@intrinsic
def add_sums(typing: Any, left: Any, right: Any) -> Any:
    """Return the sums' sums."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        total = arguments[0]
        for i in range(left.count):
            both = [builder.extract_value(sums, i) for sums in arguments]
            total = builder.insert_value(total, builder.fadd(*both), i)
        return total

    return left(left, left), generate


@intrinsic
def add_codeword(typing: Any, sums: Any, digits: Any, place: Any, token_bytes: Any) -> Any:
    """Return sums[t] + the int8 digits at an address * the float32 at `place` + t * `token_bytes`, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        total, at, place, step = arguments
        values = _digits(builder, at, sums.lanes)
        for i in range(sums.count):
            own = builder.add(place, builder.mul(step, ir.Constant(_INT64, i)))
            x = _load(builder, own, values.type, 4)
            added = _multiply_add(builder, values, x, builder.extract_value(total, i))
            total = builder.insert_value(total, added, i)
        return total

    return sums(sums, types.uint64, types.uint64, types.uint64), generate


@intrinsic
def add_column(typing: Any, sums: Any, weights: Any, row_bytes: Any, place: Any) -> Any:
    """Return sums[r] + the float32 at `weights` + r * `row_bytes` * the float32 vector at `place`, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        total, weights, step, place = arguments
        kind = ir.VectorType(_FLOAT, sums.lanes)
        x = _load(builder, place, kind, 4)
        undefined = ir.Constant(kind, ir.Undefined)
        all_lanes = ir.Constant(ir.VectorType(_INT32, sums.lanes), [0] * sums.lanes)
        for i in range(sums.count):
            own = builder.add(weights, builder.mul(step, ir.Constant(_INT64, i)))
            one = builder.insert_element(undefined, _load(builder, own, _FLOAT, 4), ir.Constant(_INT32, 0))
            weight = builder.shuffle_vector(one, undefined, all_lanes)
            added = _multiply_add(builder, weight, x, builder.extract_value(total, i))
            total = builder.insert_value(total, added, i)
        return total

    return sums(sums, types.uint64, types.uint64, types.uint64), generate


@intrinsic
def store_totals(typing: Any, address: Any, sums: Any) -> Any:
    """Write the total of each vector's lanes, float32 after float32, in a fixed order of additions (halves)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place, total = arguments
        pointer = builder.inttoptr(place, _FLOAT.as_pointer())
        for i in range(sums.count):
            vector, lanes = builder.extract_value(total, i), sums.lanes
            while lanes > 1:
                lanes //= 2
                undefined = ir.Constant(vector.type, ir.Undefined)
                halves = [
                    builder.shuffle_vector(
                        vector, undefined, ir.Constant(ir.VectorType(_INT32, lanes), list(range(start, start + lanes)))
                    )
                    for start in (0, lanes)
                ]
                vector = builder.fadd(*halves)
            one = builder.extract_element(vector, ir.Constant(_INT32, 0))
            builder.store(one, builder.gep(pointer, [ir.Constant(_INT64, i)]), align=4)
        return context.get_dummy_value()

    return types.void(types.uint64, sums), generate


@intrinsic
def accumulate_sums(typing: Any, address: Any, row_bytes: Any, sums: Any) -> Any:
    """Add vector r to the float32 at an address + r * `row_bytes`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place, step, total = arguments
        kind = ir.VectorType(_FLOAT, sums.lanes)
        for i in range(sums.count):
            own = builder.inttoptr(builder.add(place, builder.mul(step, ir.Constant(_INT64, i))), kind.as_pointer())
            builder.store(builder.fadd(builder.load(own, align=4), builder.extract_value(total, i)), own, align=4)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, sums), generate
