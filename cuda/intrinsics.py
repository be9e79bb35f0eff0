"""Single instructions that numba-cuda has no name for; `tests/emulator.py` says in Python what each of them does.

They cost no GPU to import: without numba-cuda they are None, and no kernel can be compiled.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from qmoe_lite.cuda import launch


def intrinsic(generate: Callable[..., Any]) -> Any:
    """Make an intrinsic of a function that gives its signature and its code generator; None without numba-cuda."""
    return None if launch.extending is None else launch.extending.intrinsic(generate)


def _ir() -> Any:
    return importlib.import_module("llvmlite.ir")


def _types() -> Any:
    return importlib.import_module("numba.core.types")


def _read_only(builder: Any, pointer: Any, bytes_: int) -> Any:
    loaded = builder.load(pointer)
    loaded.align = bytes_
    loaded.set_metadata("invariant.load", builder.module.add_metadata([]))
    return loaded


def _at(context: Any, builder: Any, kind: Any, array: Any, place: Any, unit: Any) -> Any:
    """Return the LLVM pointer to a `unit` at a place, which `origin` counts from."""
    ir = _ir()
    if hasattr(kind, "ndim"):
        return builder.inttoptr(place, unit.as_pointer(3))
    start = builder.bitcast(array, ir.IntType(8).as_pointer())
    start = builder.addrspacecast(start, ir.IntType(8).as_pointer(1))
    place = builder.zext(place, ir.IntType(64))
    return builder.bitcast(builder.gep(start, [place], inbounds=True), unit.as_pointer(1))


def _from_begin(context: Any, builder: Any, kind: Any, array: Any, offset: Any, unit: Any) -> Any:
    """Return the LLVM pointer to a `unit` that lies so many bytes from an array's begin."""
    ir = _ir()
    space = 3 if hasattr(kind, "ndim") else 1
    start = context.make_array(kind)(context, builder, array).data if space == 3 else array
    start = builder.addrspacecast(builder.bitcast(start, ir.IntType(8).as_pointer()), ir.IntType(8).as_pointer(space))
    place = builder.gep(start, [builder.zext(offset, ir.IntType(64))], inbounds=True)
    return builder.bitcast(place, unit.as_pointer(space))


@intrinsic
def origin(typing: Any, array: Any) -> Any:
    """(array in shared memory, or pointer) -> uint32: the place of its first byte; 0 of a pointer's."""
    types = _types()

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        ir = _ir()
        kind = signature.args[0]
        if not hasattr(kind, "ndim"):
            return ir.Constant(ir.IntType(32), 0)
        start = context.make_array(kind)(context, builder, arguments[0]).data
        start = builder.addrspacecast(start, start.type.pointee.as_pointer(3))
        return builder.ptrtoint(start, ir.IntType(32))

    return types.uint32(array), generate


@intrinsic
def advanced(typing: Any, array: Any, count: Any) -> Any:
    """(T*, int64) -> T*: the array from the element of that number on."""
    types = _types()

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.gep(arguments[0], [arguments[1]], inbounds=True)

    return array(array, types.int64), generate


@intrinsic
def load_quad(typing: Any, array: Any, index: Any) -> Any:
    """(uint32*, int32) -> 4 uint32: the quad of that number, in one load of 128 bits; nobody writes it meanwhile."""
    types = _types()

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        ir = _ir()
        quad = ir.VectorType(ir.IntType(32), 4)
        start = builder.addrspacecast(builder.bitcast(arguments[0], quad.as_pointer()), quad.as_pointer(1))
        index = builder.sext(arguments[1], ir.IntType(64))
        loaded = _read_only(builder, builder.gep(start, [index], inbounds=True), 16)
        words = [builder.extract_element(loaded, ir.Constant(ir.IntType(32), i)) for i in range(4)]
        return context.make_tuple(builder, signature.return_type, words)

    return types.UniTuple(types.uint32, 4)(array, types.int32), generate


@intrinsic
def load_constant(typing: Any, array: Any, index: Any) -> Any:
    """(T*, int32) -> T: an element of an array that nobody writes meanwhile."""
    types = _types()

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        ir = _ir()
        element = context.get_value_type(signature.return_type)
        start = builder.addrspacecast(arguments[0], element.as_pointer(1))
        index = builder.sext(arguments[1], ir.IntType(64))
        return _read_only(builder, builder.gep(start, [index], inbounds=True), signature.return_type.bitwidth // 8)

    return array.dtype(array, types.int32), generate


@intrinsic
def word_at(typing: Any, array: Any, place: Any) -> Any:
    """(uint32 array or pointer, uint32) -> uint32: the element at a place, in bytes from where `origin` counts."""
    types = _types()

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _at(context, builder, signature.args[0], arguments[0], arguments[1], _ir().IntType(32))
        loaded = builder.load(pointer)
        loaded.align = 4
        return loaded

    return types.uint32(array, types.uint32), generate


@intrinsic
def pair_at(typing: Any, array: Any, offset: Any) -> Any:
    """(uint32 array in shared memory or pointer, uint32) -> 2 uint32: those at so many bytes from its begin."""
    types = _types()

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        ir = _ir()
        pair = ir.VectorType(ir.IntType(32), 2)
        loaded = builder.load(_from_begin(context, builder, signature.args[0], arguments[0], arguments[1], pair))
        loaded.align = 8
        words = [builder.extract_element(loaded, ir.Constant(ir.IntType(32), i)) for i in range(2)]
        return context.make_tuple(builder, signature.return_type, words)

    return types.UniTuple(types.uint32, 2)(array, types.uint32), generate


def _as(builder: Any, pointer: Any, unit: Any) -> Any:
    """Return the same place as a pointer to a `unit`."""
    return builder.bitcast(pointer, unit.as_pointer(pointer.type.addrspace))


def _load_values(builder: Any, kind: Any, pointer: Any, count: int) -> list[Any]:
    """Return `count` floats that lie side by side, in one load; of uint16 arrays those that have their upper halves."""
    ir = _ir()
    if kind.dtype != _types().uint16:
        loaded = builder.load(
            builder.bitcast(pointer, ir.VectorType(ir.FloatType(), count).as_pointer(pointer.type.addrspace))
        )
        loaded.align = 4 * count
        return [builder.extract_element(loaded, ir.Constant(ir.IntType(32), i)) for i in range(count)]
    number = ir.IntType(32)
    if count == 1:
        half = builder.load(_as(builder, pointer, ir.IntType(16)))
        half.align = 2
        words = [builder.shl(builder.zext(half, number), ir.Constant(number, 16))]
    else:
        pairs = builder.load(
            builder.bitcast(pointer, ir.VectorType(number, count // 2).as_pointer(pointer.type.addrspace))
        )
        pairs.align = 2 * count
        words = []
        for i in range(count // 2):
            pair = builder.extract_element(pairs, ir.Constant(number, i))
            words.append(builder.shl(pair, ir.Constant(number, 16)))
            words.append(builder.and_(pair, ir.Constant(number, 0xFFFF0000)))
    return [builder.bitcast(word, ir.FloatType()) for word in words]


@intrinsic
def add_digits(typing: Any, total: Any, array: Any, offset: Any, low: Any, high: Any, span: Any) -> Any:
    """(n floats, float32 or bfloat16 array in shared memory, uint32, 2 uint32, tuple) -> n floats: 8 digits added.

    The digits are the bytes of `low`, then of `high`, less 128; each is multiplied by what it meets. The row of the
    first one lies `offset` bytes from the array's begin, those of the next ones behind it: n values for the digit
    itself, n for the one after it and so on, for as many as `span` has elements. A uint16 array holds bfloat16 values.
    """
    types = _types()

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        ir = _ir()
        number, byte = ir.IntType(32), ir.IntType(8)
        width, spanned, kind = signature.return_type.count, signature.args[5].count, signature.args[1]
        row_bytes = kind.dtype.bitwidth // 8 * width * spanned
        start = _from_begin(context, builder, kind, arguments[1], arguments[2], byte)
        totals = [builder.extract_value(arguments[0], i) for i in range(width)]
        select = ir.InlineAsm(ir.FunctionType(number, [number] * 3), "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r")
        values: list[Any] = []
        for digit in range(8):
            if digit % spanned == 0:
                place = builder.gep(start, [ir.Constant(number, digit * row_bytes)], inbounds=True)
                values = _load_values(builder, kind, place, width * spanned)
            # the byte becomes the lowest one of 2**23 as a float
            bits = builder.call(
                select,
                [arguments[3 + digit // 4], ir.Constant(number, 0x4B000000), ir.Constant(number, 0x7440 + digit % 4)],
            )
            factor = builder.fadd(
                builder.bitcast(bits, ir.FloatType()), ir.Constant(ir.FloatType(), -float(2**23 + 128))
            )
            for i in range(width):
                totals[i] = builder.fma(factor, values[digit % spanned * width + i], totals[i])
        return context.make_tuple(builder, signature.return_type, totals)

    return total(total, array, types.uint32, types.uint32, types.uint32, span), generate


@intrinsic
def add_multiple(typing: Any, total: Any, array: Any, place: Any, factor: Any) -> Any:
    """(n floats, array as add_digits takes or pointer, uint32, float32) -> n floats: total + factor * n at a place."""
    types = _types()

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        width, kind = signature.return_type.count, signature.args[1]
        pointer = _at(context, builder, kind, arguments[1], arguments[2], _ir().IntType(8))
        values = _load_values(builder, kind, pointer, width)
        before = [builder.extract_value(arguments[0], i) for i in range(width)]
        totals = [builder.fma(arguments[3], value, old) for value, old in zip(values, before, strict=True)]
        return context.make_tuple(builder, signature.return_type, totals)

    return total(total, array, types.uint32, types.float32), generate


@intrinsic
def dot_bytes(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """(uint32, uint32, uint32) -> uint32: c + the products of the four bytes of a and b."""
    types = _types()
    word = types.uint32

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        ir = _ir()
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(32)] * 3)
        return builder.call(ir.InlineAsm(kind, "dp4a.u32.u32 $0, $1, $2, $3;", "=r,r,r,r"), arguments)

    return word(word, word, word), generate


@intrinsic
def bits_of_quad(typing: Any, quad: Any, bit: Any) -> Any:
    """(4 uint32, int) -> uint32: the 32 bits from `bit` (0 to 127) on, the first word lowest; behind them zeros."""
    types = _types()

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        ir = _ir()
        wide = ir.IntType(128)
        whole = builder.zext(builder.extract_value(arguments[0], 0), wide)
        for i in range(1, 4):
            word = builder.zext(builder.extract_value(arguments[0], i), wide)
            whole = builder.or_(whole, builder.shl(word, ir.Constant(wide, 32 * i)))
        return builder.trunc(builder.lshr(whole, builder.zext(arguments[1], wide)), ir.IntType(32))

    return types.uint32(types.UniTuple(types.uint32, 4), bit), generate


@intrinsic
def float_of_bits(typing: Any, bits: Any) -> Any:
    """(uint32) -> float32 that has these bits."""
    types = _types()

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _ir().FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def load_float(typing: Any, array: Any, index: Any) -> Any:
    """(float32*, float16*, or uint16* for bfloat16; int64) -> float32: one activation."""
    types = _types()

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        ir = _ir()
        kind = signature.args[0].dtype
        unit = ir.FloatType() if kind == types.float32 else ir.IntType(16)
        start = builder.addrspacecast(builder.bitcast(arguments[0], unit.as_pointer()), unit.as_pointer(1))
        value = _read_only(
            builder, builder.gep(start, [arguments[1]], inbounds=True), 4 if kind == types.float32 else 2
        )
        if kind == types.float32:
            return value
        if kind == types.float16:
            return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
        return builder.bitcast(
            builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16)), ir.FloatType()
        )

    return types.float32(array, types.int64), generate


@intrinsic
def store_float(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """(array as for load_float, or in shared memory; int64, float32): write the nearest value, ties to even."""
    types = _types()

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        ir = _ir()
        kind = signature.args[0].dtype
        value = arguments[2]
        if kind == types.float16:
            value = builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))
        elif kind == types.uint16:
            form = ir.FunctionType(ir.IntType(16), [ir.FloatType()])
            value = builder.call(ir.InlineAsm(form, "cvt.rn.bf16.f32 $0, $1;", "=h,f"), [value])
        shared = hasattr(signature.args[0], "ndim")
        start = context.make_array(signature.args[0])(context, builder, arguments[0]).data if shared else arguments[0]
        pointer = builder.gep(_as(builder, start, value.type), [arguments[1]], inbounds=True)
        builder.store(value, pointer, align=4 if kind == types.float32 else 2)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.float32), generate
