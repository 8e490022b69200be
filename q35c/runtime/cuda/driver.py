"""libcuda by ctypes: the calls that this runtime makes, each checked, and the errors that they become.

Only `Driver` knows the library. Addresses on the device are integers; streams, graphs and the like are opaque pointers.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Generator, Mapping
from typing import Any

from q35c.errors import DeviceError, DeviceFault, NoDevice, OutOfDeviceMemory

LIBRARY = "Q35C_LIBCUDA"  # the environment variable that says where the driver lies
MINIMUM = 13000  # what cubins of CUDA 13 need: the driver of CUDA 13.0
MINIMUM_RELEASE = "580"

_DEFAULT = "libcuda.so.1"
_INT, _UINT, _LONG = ctypes.c_int, ctypes.c_uint, ctypes.c_ulonglong
_SIZE, _ADDRESS = ctypes.c_size_t, ctypes.c_uint64
_POINTER, _TEXT = ctypes.c_void_p, ctypes.c_char_p

# Without their types ctypes cuts pointers to 32 bits. All return a code, 0 for success.
FUNCTIONS: Mapping[str, tuple[type[Any], ...]] = {
    "cuDriverGetVersion": (_POINTER,),
    "cuGetErrorName": (_INT, _POINTER),
    "cuInit": (_UINT,),
    "cuDeviceGetCount": (_POINTER,),
    "cuDeviceGet": (_POINTER, _INT),
    "cuDeviceGetName": (_TEXT, _INT, _INT),
    "cuDeviceGetUuid_v2": (_POINTER, _INT),
    "cuDeviceGetAttribute": (_POINTER, _INT, _INT),
    "cuDevicePrimaryCtxRetain": (_POINTER, _INT),
    "cuDevicePrimaryCtxRelease_v2": (_INT,),
    "cuCtxPushCurrent_v2": (_POINTER,),
    "cuCtxPopCurrent_v2": (_POINTER,),
    "cuMemGetInfo_v2": (_POINTER, _POINTER),
    "cuMemAlloc_v2": (_POINTER, _SIZE),
    "cuMemFree_v2": (_ADDRESS,),
    "cuMemHostAlloc": (_POINTER, _SIZE, _UINT),
    "cuMemFreeHost": (_POINTER,),
    "cuMemcpyHtoDAsync_v2": (_ADDRESS, _POINTER, _SIZE, _POINTER),
    "cuMemcpyDtoHAsync_v2": (_POINTER, _ADDRESS, _SIZE, _POINTER),
    "cuMemsetD8Async": (_ADDRESS, ctypes.c_ubyte, _SIZE, _POINTER),
    "cuMemGetAllocationGranularity": (_POINTER, _POINTER, _INT),
    "cuMemAddressReserve": (_POINTER, _SIZE, _SIZE, _ADDRESS, _LONG),
    "cuMemAddressFree": (_ADDRESS, _SIZE),
    "cuMemCreate": (_POINTER, _SIZE, _POINTER, _LONG),
    "cuMemRelease": (_LONG,),
    "cuMemMap": (_ADDRESS, _SIZE, _SIZE, _LONG, _LONG),
    "cuMemUnmap": (_ADDRESS, _SIZE),
    "cuMemSetAccess": (_ADDRESS, _SIZE, _POINTER, _SIZE),
    "cuStreamCreate": (_POINTER, _UINT),
    "cuStreamDestroy_v2": (_POINTER,),
    "cuStreamSynchronize": (_POINTER,),
    "cuStreamBeginCapture_v2": (_POINTER, _INT),
    "cuStreamEndCapture": (_POINTER, _POINTER),
    "cuGraphInstantiateWithFlags": (_POINTER, _POINTER, _LONG),
    "cuGraphLaunch": (_POINTER, _POINTER),
    "cuGraphDestroy": (_POINTER,),
    "cuGraphExecDestroy": (_POINTER,),
    "cuEventCreate": (_POINTER, _UINT),
    "cuEventDestroy_v2": (_POINTER,),
    "cuEventRecord": (_POINTER, _POINTER),
    "cuEventSynchronize": (_POINTER,),
    "cuEventElapsedTime": (_POINTER, _POINTER, _POINTER),
    "cuModuleLoadData": (_POINTER, _POINTER),
    "cuModuleUnload": (_POINTER,),
    "cuModuleGetFunction": (_POINTER, _POINTER, _TEXT),
    "cuFuncSetAttribute": (_POINTER, _INT, _INT),
    "cuFuncLoad": (_POINTER,),
    "cuLaunchKernel": (_POINTER, *[_UINT] * 7, _POINTER, _POINTER, _POINTER),
}

_OUT_OF_MEMORY = 2
_FORKED = 3  # CUDA_ERROR_NOT_INITIALIZED: what cuInit says in a child of a process that called it
# After these the context is lost, and every call fails: the device is gone (46), ECC (214, 220), a kernel's faults, unknown (999).
_FAULTS = frozenset((46, 214, 220, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 999))


class Driver:
    """The driver's library, initialised: every call is checked. Thread-safe, as the library is."""

    def __init__(self) -> None:
        """Load and initialise libcuda. Raises NoDevice where there is none, it is too old or finds no device."""
        self.path = os.environ.get(LIBRARY) or _DEFAULT
        try:
            self._library = ctypes.CDLL(self.path)
            get_version = self._library.cuDriverGetVersion
        except (OSError, AttributeError) as error:
            raise NoDevice(
                "there is no NVIDIA driver on this machine",
                expected=self.path,
                got=str(error),
                hint="install the driver, name its library in Q35C_LIBCUDA, or compile with --target cpu",
            ) from None
        version = ctypes.c_int()
        get_version(ctypes.byref(version))
        if version.value < MINIMUM:
            raise NoDevice(
                "the NVIDIA driver is too old",
                where=self.path,
                expected=f"a driver for CUDA {_version_text(MINIMUM)}, which is {MINIMUM_RELEASE} or later",
                got=f"one for CUDA {_version_text(version.value)}",
                hint="update the driver, or compile with --target cpu",
            )
        self.version = version.value
        self._functions = {name: self._bind(name) for name in FUNCTIONS}
        self._start()

    def _bind(self, name: str) -> Any:
        try:
            function = getattr(self._library, name)
        except AttributeError:
            raise NoDevice(
                "the NVIDIA driver lacks a function", where=self.path, expected=name
            ) from None
        function.argtypes, function.restype = FUNCTIONS[name], ctypes.c_int
        return function

    def _start(self) -> None:
        code = self._functions["cuInit"](0)
        if code == _FORKED:
            raise NoDevice(
                "this process was forked from one that had used CUDA, which does not work in its children",
                where=self.path,
                hint="start processes with `spawn`, or load CUDA models in the child alone",
            )
        if code:
            raise NoDevice(
                "the NVIDIA driver finds no device it can use",
                where=self.path,
                got=self.error_name(code),
                hint="see what `nvidia-smi` says, or compile with --target cpu",
            )

    def function(self, name: str) -> Any:
        """Return a function as it is, unchecked, for calls that must cost little."""
        return self._functions[name]

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function. Raises OutOfDeviceMemory, DeviceFault or DeviceError, as its code says."""
        code = self._functions[name](*arguments)
        if code:
            raise self.error(name, code)

    def integer(self, name: str, *arguments: Any) -> int:
        """Return the C int that a function writes through its first argument."""
        return self._get(ctypes.c_int(), name, *arguments)

    def size(self, name: str, *arguments: Any) -> int:
        """Return the address, handle or size of 64 bits that a function writes through its first argument."""
        return self._get(ctypes.c_uint64(), name, *arguments)

    def _get(self, value: Any, name: str, *arguments: Any) -> int:
        self.call(name, ctypes.byref(value), *arguments)
        return value.value

    def error(self, name: str, code: int) -> DeviceError | OutOfDeviceMemory:
        """Return the error that a function's code means."""
        text = f"{name}: {self.error_name(code)}"
        if code == _OUT_OF_MEMORY:
            return OutOfDeviceMemory(
                "the device has not enough memory left",
                got=text,
                hint="close sessions or other programs, or ask for a smaller context or batch",
            )
        if code in _FAULTS:
            return DeviceFault(
                "the device failed",
                code=code,
                got=text,
                hint="start the process again: what CUDA had in it is lost; models on the CPU are not",
            )
        return DeviceError("a call of the NVIDIA driver failed", code=code, got=text)

    def error_name(self, code: int) -> str:
        """Return the driver's name of a code."""
        text = ctypes.c_char_p()
        self._functions["cuGetErrorName"](code, ctypes.byref(text))
        return f"{(text.value or b'CUDA_ERROR').decode('ascii', 'replace')} ({code})"

    @contextlib.contextmanager
    def current(self, context: int) -> Generator[None]:
        """Make a context this thread's; the one that was, perhaps another library's, comes back."""
        self.call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            self._functions["cuCtxPopCurrent_v2"](ctypes.byref(ctypes.c_void_p()))


def _version_text(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
