"""How PyTorch runs: on how many threads, and whether compiled."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from proximo.machine import Device

HINT = "--device cuda needs PyTorch built for CUDA and its driver, --device mps a Mac with PyTorch for it"
MIN_MINIBATCHES = 20_000  # minibatches: a compiled one is about 1 ms quicker, and compiling takes 8 to 15 s


def available_devices() -> list[str]:
    """What PyTorch can use here."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return ["cpu", *(name for name, there in found.items() if there)]


@contextmanager
def num_threads(threads: int) -> Iterator[None]:
    """Let PyTorch use so many threads within this block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def default_device(device: Device) -> Iterator[None]:
    """Have tensors made on this device within this block. On the CPU nothing is done, which would cost every call."""
    if device.name == "cpu":
        yield
    else:
        with torch.device(device.name):
            yield


def can_compile() -> bool:
    """Whether PyTorch finds what it compiles with."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return shutil.which(compiler) is not None and headers.exists()
