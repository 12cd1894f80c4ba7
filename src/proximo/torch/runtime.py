"""Devices, threads and compiler of PyTorch."""

import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from proximo.machine import Device

HINT = "--device cuda needs PyTorch for CUDA and a CUDA driver; --device mps needs PyTorch for Apple silicon"
MIN_MINIBATCHES = 20_000  # compilation takes 8 to 15 s and saves about 1 ms per minibatch


def available_devices() -> list[str]:
    """Names of the available devices."""
    is_available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return ["cpu", *(name for name in is_available if is_available[name])]


@contextmanager
def num_threads(threads: int) -> Iterator[None]:
    """Set the number of threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def default_device(device: Device) -> Iterator[None]:
    """Create tensors on a device within the block."""
    if device.name == "cpu":  # the default; the context manager would slow down every call
        yield
    else:
        with torch.device(device.name):
            yield


def can_compile() -> bool:
    """Whether the C++ compiler and Python's headers are installed, which torch.compile needs."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return shutil.which(compiler) is not None and headers.exists()
