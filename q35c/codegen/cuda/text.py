"""TIR functions to one CUDA text, and how each kernel in it is launched. Neither a driver nor a CUDA compiler is touched."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import tirx
from tvm.tirx import PrimFunc
from tvm.tirx.build import split_host_device_mods

from q35c.codegen.cuda.prelude import PRELUDE
from q35c.errors import InternalError

# The architecture for which TVM prints; what is printed compiles for every later one.
_ORACLE_ARCHITECTURE = "sm_80"
_VALUE = 15  # kind of a field that a packed call's argument is stored to: its value
_AXES = ("x", "y", "z")
# The first shrinks padded shared memory that asm addresses; the second would pass what host and kernel both compute.
_NOT_WANTED = ("s_tir.CompactBufferAllocation", "tirx.CommonSubexprElim")
_DYNAMIC = "tirx.use_dyn_shared_memory"
_FIRST_KERNEL = 'extern "C" __global__'


@dataclass(frozen=True, slots=True)
class Launched:
    """A kernel in the text: its symbol, its parameters in order with their types, threads, dynamic shared bytes, and extents.

    TVM sorts parameters by name: only names say which argument is which. Those of pointers are as in the TIR function, in
    lower case.
    """

    symbol: str
    parameters: tuple[tuple[str, str], ...]
    block: tuple[int, int, int]
    shared_bytes: int
    grid: tuple[Any, Any, Any]  # expressions of scalar parameters
    scalars: dict[str, Any]

    def blocks(self, **scalars: int) -> tuple[int, ...]:
        """Return the grid for these values of scalar parameters."""
        analyzer: Any = tvm.sym.Analyzer()
        for name, value in scalars.items():
            if name in self.scalars:
                analyzer.bind(self.scalars[name], tirx.const(value, "int32"))
        return tuple(int(analyzer.simplify(extent)) for extent in self.grid)


@functools.cache
def _target() -> tvm.target.Target:
    limits = {
        "max_threads_per_block": 1024,
        "max_shared_memory_per_block": 232_448,
        "thread_warp_size": 32,
    }
    cuda = {"kind": "cuda", "arch": _ORACLE_ARCHITECTURE, **limits}
    return tvm.target.Target(cuda, host={"kind": "llvm"})


def cuda_text(functions: Mapping[str, PrimFunc]) -> tuple[str, dict[str, Launched]]:
    """Return the CUDA text of all functions, and how each is launched, by name."""
    target = _target()
    named: Any = {
        name: function.with_attr("global_symbol", name) for name, function in functions.items()
    }
    with tvm.transform.PassContext(disabled_pass=list(_NOT_WANTED)):
        module: Any = tirx.transform.BindTarget(target)(tvm.IRModule(named))
        passes: Any = tirx.get_default_tir_pipeline(target)
        pipeline, finish_host, finish_device = passes
        host, devices = split_host_device_mods(pipeline(module))
        host = finish_host()(host)
        (device,) = [finish_device()(one) for one in devices.values()]
    source = tvm.get_global_func("target.build.cuda")(device, target).inspect_source()
    calls = {
        name: found for function in host.functions.values() for name, found in _calls(function)
    }
    launched = [_launched(kernel, calls) for kernel in device.functions.values()]
    by_name = {one.symbol.removesuffix("_kernel"): one for one in launched}
    if set(by_name) != set(functions):
        raise InternalError(
            "kernels got other names", expected=sorted(functions), got=sorted(by_name)
        )
    return source.replace(_FIRST_KERNEL, PRELUDE + _FIRST_KERNEL, 1), by_name


def _launched(kernel: Any, calls: Mapping[str, list[Any]]) -> Launched:
    symbol = str(kernel.attrs["global_symbol"])
    tags = [str(tag) for tag in kernel.attrs["tirx.kernel_launch_params"]]
    given = calls[symbol]
    count = len(kernel.params)
    parameters = tuple((_name(p.name), _type(p)) for p in kernel.params)
    scalars = {
        name: variable
        for (name, _), argument in zip(parameters, given, strict=False)
        if isinstance(variable := _plain(argument), tirx.Var)
    }
    extents = {tag: _plain(extent) for tag, extent in zip(tags, given[count:], strict=False)}
    one = tirx.const(1, "int32")
    block = tuple(int(extents.get(f"threadIdx.{axis}", one)) for axis in _AXES)
    grid = tuple(extents.get(f"blockIdx.{axis}", one) for axis in _AXES)
    return Launched(symbol, parameters, block, int(extents.get(_DYNAMIC, 0)), grid, scalars)  # type: ignore[arg-type]


def _name(device_name: str) -> str:
    return device_name.removesuffix("_ptr").lower()


def _type(parameter: Any) -> str:
    if isinstance(parameter.ty, tvm.ir.PointerType):
        return "pointer"
    return {"int32": "i32", "int64": "i64"}[str(parameter.ty.dtype)]


def _plain(expression: Any) -> Any:
    """Return what a packed call's argument says, without the casts around it."""
    while isinstance(expression, tirx.Cast):
        expression = expression.value
    return expression


def _calls(function: Any) -> Iterator[tuple[str, list[Any]]]:
    """Yield the launches in a host function: the kernel's symbol, and its arguments and extents."""
    values: dict[int, Any] = {}
    for call in _nodes(function.body):
        operation = getattr(call.op, "name", "")
        if operation == "tirx.tvm_struct_set" and int(call.args[2]) == _VALUE:
            values[int(call.args[1])] = call.args[3]
        elif operation.startswith("tirx.tvm_call_packed_lowered"):
            yield str(call.args[0].value), [values[index] for index in sorted(values)]


def _nodes(node: Any) -> Iterator[Any]:
    """Yield the calls of a statement in order."""
    if isinstance(node, tvm.ir.Call):
        yield node
        return
    for field in ("seq", "body", "value", "then_case", "else_case"):
        child = getattr(node, field, None)
        for part in child if field == "seq" and child is not None else [child]:
            if isinstance(part, tvm.runtime.Object):
                yield from _nodes(part)
