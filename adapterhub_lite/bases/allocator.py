"""Keep freed memory in the process, so that large temporary tensors do not fault in their pages anew each time.

glibc gives blocks of 128 KB and more back to the system when they are freed, and a training step allocates thousands.
"""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
# The largest threshold glibc accepts on 64-bit systems.
_MMAP_THRESHOLD = 32 * 2**20
_KEPT = 2**30


def return_freed_memory() -> None:
    """Give what is free now back to the system: large tensors that were replaced once leave gaps of no use."""
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> bool:
    """Raise glibc's thresholds for returning memory; False where the allocator is another one."""
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    settings = ((_M_MMAP_THRESHOLD, _MMAP_THRESHOLD), (_M_TRIM_THRESHOLD, _KEPT), (_M_TOP_PAD, 64 * 2**20))
    return all(mallopt(name, value) == 1 for name, value in settings)
