"""What TVM compiles for a GPU, run without one: OpenCL by PoCL, WebGPU by wgpu on whatever Vulkan driver there is.

TVM's host code stays as it is on a device: it checks the arguments, binds the symbols of shapes and works out the
extents of a launch. Only the launches come here, to a device that compiles the generated source and gets every buffer
copied there and back. So tensors live in the processor's memory, and all that is built inside `running_on` runs on
`tvm.cpu()`: single functions, and a whole model in the virtual machine, with its real paged cache.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Protocol

import numpy as np
import pytest
from numpy.typing import NDArray

Buffers = list[NDArray[np.uint8]]
Scalars = list[tuple[str, float]]
"""Type and value of each argument that is no buffer, in order."""
Extents = tuple[int, int, int]
Launch = Callable[[Buffers, Scalars, Extents, Extents], None]
"""Runs a kernel with buffers, which it changes, and scalars, on a grid of blocks, with threads in each block."""
LIMITS = {
    "max-compute-workgroup-storage-size": 32768,
    "max-storage-buffers-per-shader-stage": 10,
    "max-compute-invocations-per-workgroup": 256,
}
"""What the kernels need beyond what WebGPU promises."""
DEVICE_TYPES = {"opencl": 4, "webgpu": 15}
"""DLPack's numbers."""
TYPE_OF_DEVICE = 10
"""Field of a tensor that `tvm_struct_get` reads."""
CALL, FIELD, DATA = (f"tirx.{name}" for name in ("tvm_call_packed", "tvm_struct_get", "buffer_data"))
SERIAL = itertools.count()


class Device(Protocol):
    """Something that runs kernels of one kind of TVM target."""

    kind: str
    float16: bool

    def load(self, source: str, name: str) -> Launch:
        """A kernel of a source text."""
        ...


def refused(cl: Any, context: Any) -> str | None:
    """What a device's compiler says to an empty kernel, None when it takes it.

    PoCL 3.0, the newest on the package index, knows no processor that is younger than its LLVM.
    """
    try:
        cl.Program(context, "kernel void nothing(global float *buffer) {}").build(["-cl-opt-disable"])
    except (cl.Error, RuntimeError) as error:
        return next((line for line in str(error).splitlines() if "error:" in line), str(error)[:80])
    return None


class OpenCL:
    """The first OpenCL device; skips the test where there is none."""

    kind = "opencl"

    def __init__(self) -> None:
        cl = pytest.importorskip("pyopencl", reason="pyopencl is not installed; next: pip install pyopencl[pocl]")
        try:
            device = cl.get_platforms()[0].get_devices()[0]
        except cl.Error as error:
            pytest.skip(f"OpenCL finds no device ({error}); next: pip install pyopencl[pocl]")
        self.float16 = "cl_khr_fp16" in device.extensions.split()
        self._cl, self._context = cl, cl.Context([device])
        if why := refused(cl, self._context):
            pytest.skip(f"{device.version} compiles nothing for this processor: {why}")
        self._queue = cl.CommandQueue(self._context)

    def load(self, source: str, name: str) -> Launch:
        """A kernel of OpenCL C; not optimized, since that takes PoCL ten seconds for one kernel of attention."""
        cl = self._cl
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", cl.CompilerWarning)
            kernel = cl.Kernel(cl.Program(self._context, source).build(["-cl-opt-disable"]), name)

        def launch(buffers: Buffers, scalars: Scalars, grid: Extents, block: Extents) -> None:
            flags = cl.mem_flags.READ_WRITE | cl.mem_flags.COPY_HOST_PTR
            held = [cl.Buffer(self._context, flags, hostbuf=each) for each in buffers]
            threads = tuple(blocks * width for blocks, width in zip(grid, block, strict=True))
            kernel(self._queue, threads, block, *held, *(np.dtype(kind).type(value) for kind, value in scalars))
            for array, buffer in zip(buffers, held, strict=True):
                cl.enqueue_copy(self._queue, array, buffer)

        return launch


class WebGPU:
    """The first Vulkan device that wgpu finds; skips the test where there is none."""

    kind = "webgpu"

    def __init__(self) -> None:
        wgpu = pytest.importorskip("wgpu", reason="wgpu is not installed; next: pip install wgpu")
        found = [each for each in wgpu.gpu.enumerate_adapters_sync() if each.info["backend_type"] == "Vulkan"]
        if not found:
            pytest.skip("wgpu finds no Vulkan device (scripts/verify_kernels brings one that needs no GPU)")
        self.float16 = "shader-f16" in found[0].features
        features = ["shader-f16"] if self.float16 else []
        self._device = found[0].request_device_sync(required_features=features, required_limits=LIMITS)

    def load(self, source: str, name: str) -> Launch:
        """A kernel of WGSL: TVM binds buffers first, in order, then one structure of scalars and the grid's width."""
        module = {"module": self._device.create_shader_module(code=source), "entry_point": name}
        kernel = self._device.create_compute_pipeline(layout="auto", compute=module)

        def launch(buffers: Buffers, scalars: Scalars, grid: Extents, _: Extents) -> None:
            make = self._device.create_buffer_with_data
            held = [make(data=np.pad(each, (0, -each.size % 4)), usage="STORAGE|COPY_SRC") for each in buffers]
            words = [np.dtype("f4" if kind.startswith("float") else "i4").type(value) for kind, value in scalars]
            uniform = np.frombuffer(b"".join(word.tobytes() for word in (*words, np.uint32(grid[0]))), np.uint8)
            bound = enumerate([*held, make(data=uniform, usage="UNIFORM")])
            entries = [{"binding": at, "resource": {"buffer": buffer}} for at, buffer in bound]
            encoder = self._device.create_command_encoder()
            work = encoder.begin_compute_pass()
            work.set_pipeline(kernel)
            layout = kernel.get_bind_group_layout(0)
            work.set_bind_group(0, self._device.create_bind_group(layout=layout, entries=entries))
            work.dispatch_workgroups(*grid)
            work.end()
            self._device.queue.submit([encoder.finish()])
            for array, buffer in zip(buffers, held, strict=True):
                array[:] = np.frombuffer(self._device.queue.read_buffer(buffer), np.uint8)[: array.size]

        return launch


def functions(module: Any, target: Any, device: Device) -> Callable[..., None]:
    """A caller of a module's scheduled TIR functions by name, with NumPy arrays, which they change, and scalars."""
    import tvm
    from tvm import relax

    with running_on(device):
        built = tvm.tirx.build(relax.transform.AttachGlobalSymbol()(module), target=target)

    def call(name: str, *arguments: NDArray[Any] | float) -> None:
        tensors: list[Any] = [tvm.runtime.tensor(each) if isinstance(each, np.ndarray) else each for each in arguments]
        built[name](*tensors)
        for array, tensor in zip(arguments, tensors, strict=True):
            if isinstance(array, np.ndarray):
                array[...] = tensor.numpy()

    return call


@contextmanager
def running_on(device: Device) -> Iterator[None]:
    """Leave to a device the kernels of all that TVM builds meanwhile."""
    import tvm
    from tvm import tirx
    from tvm.tirx import compilation_pipeline
    from tvm.tirx.build import codegen_build, split_host_device_mods

    usual = compilation_pipeline.PIPELINE_MAP["s_tir"]

    def lowering() -> tuple[Any, Any, Any]:
        lower, finalize_host, finalize_device = usual()

        def split(module: Any, _: Any) -> Any:
            host, modules = split_host_device_mods(lower(module))
            names = {}
            for target, kernels in modules.items():
                for symbol, kernel in finalize_device()(kernels).functions_items():
                    name = str(symbol.name_hint)
                    names[name] = f"edgeq.{device.kind}.{next(SERIAL)}.{name}"
                    generate = partial(codegen_build, tvm.IRModule({symbol: kernel}), target)
                    tvm.register_global_func(names[name], entry(partial(load, device, generate, name), kernel))
            for symbol, function in host.functions_items():
                host[symbol] = hosted(function, names, DEVICE_TYPES[device.kind])
            return host

        return tvm.transform.module_pass(split, opt_level=0), finalize_host, finalize_device

    tirx.register_tir_pipeline("s_tir", lowering)
    try:
        yield
    finally:
        tirx.register_tir_pipeline("s_tir", usual)


def load(device: Device, generate: Callable[[], Any], name: str) -> Launch:
    """A kernel of the module that `generate` makes."""
    return device.load(generate().inspect_source(), name)


def entry(load: Callable[[], Launch], kernel: Any) -> Callable[..., None]:
    """What the host calls to launch a kernel, which is loaded the first time.

    It gets pointers and scalars in the order of the kernel's parameters, extents, and the bytes of each buffer.
    """
    from tvm.ir import PointerType

    kinds = ["" if isinstance(each.ty, PointerType) else str(each.ty.dtype) for each in kernel.params]
    axes = [str(axis) for axis in kernel.attrs["tirx.kernel_launch_params"]]
    loaded = cache(load)

    def call(*words: Any) -> None:
        given = list(zip(kinds, words, strict=False))
        addresses = [word.value for kind, word in given if not kind]
        scalars = [(kind, word) for kind, word in given if kind]
        extents = dict(zip(axes, words[len(kinds) :], strict=False))
        sizes = words[len(kinds) + len(axes) :]
        buffers = [in_place(address, size) for address, size in zip(addresses, sizes, strict=True)]
        loaded()(buffers, scalars, along(extents, "blockIdx"), along(extents, "threadIdx"))

    return call


def along(extents: Mapping[str, int], name: str) -> Extents:
    """Extents of an index in x, y and z; 1 where the kernel does not use one."""
    x, y, z = (extents.get(f"{name}.{axis}", 1) for axis in "xyz")
    return x, y, z


def in_place(address: int, size: int) -> NDArray[np.uint8]:
    """The bytes at an address."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def hosted(function: Any, names: Mapping[str, str], device_type: int) -> Any:
    """A function of the host that expects tensors in its own memory and launches kernels by these global names.

    Each launch gets the size of its buffers in bytes as well. A function without launches is returned as it is.
    """
    import tvm
    from tvm import tirx

    calls: list[Any] = []
    views: list[Any] = []

    def collect(node: Any) -> None:
        if isinstance(node, tirx.DeclBuffer):
            views.append(node)
        elif isinstance(node, tvm.ir.Call) and node.op.name == CALL and node.args[0].value in names:
            calls.append(node)

    def bytes_of(pointer: Any) -> Any:
        chain = []
        while is_buffer(pointer):
            chain.append(next(view for view in views if view.buffer.same_as(pointer.args[0])))
            pointer = chain[-1].data
        elements = math.prod(chain[0].buffer.shape) + sum(view.buffer.elem_offset for view in chain)
        return tirx.Cast("int64", elements) * chain[0].buffer.dtype.itemsize

    def change(node: Any) -> Any:
        if not isinstance(node, tvm.ir.Call):
            return None
        if node.op.name == FIELD and int(node.args[2]) == TYPE_OF_DEVICE:
            return tirx.IntImm("int32", device_type)
        if node.op.name == CALL and node.args[0].value == "__tvm_set_device":
            return tirx.IntImm("int32", 0)
        if node.op.name == CALL and node.args[0].value in names:
            name, *arguments = node.args
            return tirx.call_packed(names[name.value], *arguments, *map(bytes_of, filter(is_buffer, arguments)))
        return None

    tirx.stmt_functor.post_order_visit(function.body, collect)
    if not calls:
        return function
    return function.with_body(tirx.stmt_functor.ir_transform(function.body, None, change))


def is_buffer(node: Any) -> bool:
    """Whether an expression is the address of a buffer."""
    return getattr(getattr(node, "op", None), "name", "") == DATA
