"""Vectors of float32 as Numba values, so that accumulators stay in registers.

A NumPy array of accumulators goes through memory at each addition; LLVM keeps a vector value in as many registers as
the processor needs for it (64 lanes: 4 of AVX-512, 8 of AVX2, 16 of NEON). The number of lanes is the length of a
tuple, which the compiler knows.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

_FLOAT, _INT32 = ir.FloatType(), ir.IntType(32)


class Vector(types.Type):
    """Numba's type of a vector; `lanes` is its length."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        super().__init__(name=f"Vector({lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, ir.VectorType(_FLOAT, kind.lanes))


def _pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any, target: ir.Type) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), target.as_pointer())


@intrinsic
def load_64_bits(typing: Any, codes: Any, byte: Any) -> Any:
    """Return 8 bytes of a contiguous uint8 array as a uint64, the first one lowest; `byte` is a uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, place = arguments
        address = _pointer(context, builder, signature.args[0], array, place, ir.IntType(64))
        return builder.load(address, align=1)

    return types.uint64(codes, types.uint64), generate


@intrinsic
def zeros(typing: Any, lanes: Any) -> Any:
    """Return a vector of zeros, as long as the tuple `lanes`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(ir.VectorType(_FLOAT, lanes.count), [0.0] * lanes.count)

    return Vector(lanes.count)(lanes), generate


@intrinsic
def add_multiple(typing: Any, total: Any, factor: Any, array: Any, index: Any) -> Any:
    """Return total + factor * array[index : index + lanes], rounded once; a contiguous float32 array, a uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.VectorType(_FLOAT, total.lanes)
        before, scalar, values, place = arguments
        address = _pointer(context, builder, signature.args[2], values, place, kind)
        one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(_INT32, 0))
        all_lanes = ir.Constant(ir.VectorType(_INT32, total.lanes), [0] * total.lanes)
        factors = builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), all_lanes)
        function = ir.FunctionType(kind, [kind] * 3)
        fma = cgutils.get_or_insert_function(builder.module, function, f"llvm.fma.v{total.lanes}f32")
        return builder.call(fma, [factors, builder.load(address, align=4), before])

    return total(total, types.float32, array, types.uint64), generate


@intrinsic
def store(typing: Any, array: Any, index: Any, vector: Any) -> Any:
    """Write a vector to array[index : index + lanes]."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, place, value = arguments
        kind = ir.VectorType(_FLOAT, vector.lanes)
        builder.store(value, _pointer(context, builder, signature.args[0], values, place, kind), align=4)
        return context.get_dummy_value()

    return types.void(array, types.uint64, vector), generate
