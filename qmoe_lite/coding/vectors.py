"""Addresses and vectors of float32 as Numba values: what the inner loops of the product need and NumPy cannot say.

A NumPy array of accumulators goes through memory at each addition; LLVM keeps a vector value in as many registers as
the processor needs for it (64 lanes: 4 of AVX-512, 8 of AVX2, 16 of NEON). The number of lanes is the length of a
tuple, which the compiler knows. An address is a uint64: adding to it costs one instruction, indexing an array several.
Nothing is checked: an address must be that of memory that the array's owner keeps.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

_FLOAT, _INT32, _INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)


class Vector(types.Type):
    """Numba's type of a vector; `lanes` is its length."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        super().__init__(name=f"Vector({lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, ir.VectorType(_FLOAT, kind.lanes))


def _load(builder: Any, address: Any, kind: ir.Type, align: int) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


@intrinsic
def address_of(typing: Any, array: Any) -> Any:
    """Return where an array's data begins."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.ptrtoint(data, _INT64)

    return types.uint64(array), generate


@intrinsic
def load_64_bits(typing: Any, codes: Any, byte: Any) -> Any:
    """Return 8 bytes of a contiguous uint8 array as a uint64, the first one lowest; `byte` is a uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.bitcast(builder.gep(data, [arguments[1]]), _INT64.as_pointer())
        return builder.load(place, align=1)

    return types.uint64(codes, types.uint64), generate


@intrinsic
def load_32_at(typing: Any, address: Any) -> Any:
    """Return 4 bytes as a uint64, the first one lowest; the address is a multiple of 4."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.zext(_load(builder, arguments[0], _INT32, 4), _INT64)

    return types.uint64(types.uint64), generate


@intrinsic
def load_64_at(typing: Any, address: Any) -> Any:
    """Return 8 bytes as a uint64, the first one lowest; any address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _load(builder, arguments[0], _INT64, 1)

    return types.uint64(types.uint64), generate


def _prefetch(builder: Any, address: Any, locality: int) -> None:
    pointer = ir.IntType(8).as_pointer()
    function = ir.FunctionType(ir.VoidType(), [pointer, _INT32, _INT32, _INT32])
    name = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0i8")
    read, level, data = (ir.Constant(_INT32, value) for value in (0, locality, 1))
    builder.call(name, [builder.inttoptr(address, pointer), read, level, data])


@intrinsic
def prefetch_first(typing: Any, address: Any) -> Any:
    """Ask for a line of memory in the first-level cache; any address, even one outside every array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _prefetch(builder, arguments[0], 3)
        return context.get_dummy_value()

    return types.void(types.uint64), generate


@intrinsic
def prefetch_second(typing: Any, address: Any) -> Any:
    """Ask for a line of memory in the second-level cache; any address, even one outside every array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _prefetch(builder, arguments[0], 2)
        return context.get_dummy_value()

    return types.void(types.uint64), generate


@intrinsic
def zeros(typing: Any, lanes: Any) -> Any:
    """Return a vector of zeros, as long as the tuple `lanes`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(ir.VectorType(_FLOAT, lanes.count), [0.0] * lanes.count)

    return Vector(lanes.count)(lanes), generate


@intrinsic
def add(typing: Any, left: Any, right: Any) -> Any:
    """Return the sum of two vectors."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fadd(*arguments)

    return left(left, left), generate


@intrinsic
def add_at(typing: Any, total: Any, address: Any) -> Any:
    """Return total + the float32 values at an address, a multiple of 4."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        before, place = arguments
        return builder.fadd(before, _load(builder, place, ir.VectorType(_FLOAT, total.lanes), 4))

    return total(total, types.uint64), generate


@intrinsic
def add_multiple_at(typing: Any, total: Any, factor: Any, address: Any) -> Any:
    """Return total + the float32 at `factor` * the float32 values at `address`, rounded once; multiples of 4."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.VectorType(_FLOAT, total.lanes)
        before, one_place, place = arguments
        scalar = _load(builder, one_place, _FLOAT, 4)
        one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(_INT32, 0))
        all_lanes = ir.Constant(ir.VectorType(_INT32, total.lanes), [0] * total.lanes)
        factors = builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), all_lanes)
        function = ir.FunctionType(kind, [kind] * 3)
        fma = cgutils.get_or_insert_function(builder.module, function, f"llvm.fma.v{total.lanes}f32")
        return builder.call(fma, [factors, _load(builder, place, kind, 4), before])

    return total(total, types.uint64, types.uint64), generate


@intrinsic
def store(typing: Any, address: Any, vector: Any) -> Any:
    """Write a vector to an address, a multiple of 4."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place, value = arguments
        pointer = ir.VectorType(_FLOAT, vector.lanes).as_pointer()
        builder.store(value, builder.inttoptr(place, pointer), align=4)
        return context.get_dummy_value()

    return types.void(types.uint64, vector), generate


@intrinsic
def subtract_multiple_at(typing: Any, total: Any, factor: Any, address: Any) -> Any:
    """Return total - the float32 at `factor` * the float32 values at `address`, rounded twice; multiples of 4."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.VectorType(_FLOAT, total.lanes)
        before, one_place, place = arguments
        scalar = _load(builder, one_place, _FLOAT, 4)
        one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(_INT32, 0))
        all_lanes = ir.Constant(ir.VectorType(_INT32, total.lanes), [0] * total.lanes)
        factors = builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), all_lanes)
        return builder.fsub(before, builder.fmul(factors, _load(builder, place, kind, 4)))

    return total(total, types.uint64, types.uint64), generate


@intrinsic
def replace_above_at(typing: Any, held: Any, vector: Any, threshold: Any, address: Any) -> Any:
    """Return `held`, but the float32 values at `address` in lanes where `vector` is above those at `threshold`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.VectorType(_FLOAT, held.lanes)
        before, value, bound, place = arguments
        above = builder.fcmp_ordered(">", value, _load(builder, bound, kind, 4))
        return builder.select(above, _load(builder, place, kind, 4), before)

    return held(held, held, types.uint64, types.uint64), generate
