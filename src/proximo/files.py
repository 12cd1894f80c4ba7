"""Files of run folders, which may come from other people.

A link in a run folder could lead a reader or writer elsewhere, and a pipe or device could block it or never end. Only
regular files are opened, and the last component of a path is not followed if it is a link.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

LINK = "{} is a link, and links in a run folder are not followed. Replace it by what it points to, or delete it"
FOLDERS = ("checkpoints", "videos", "faults", "tensorboard")  # in a run folder; wandb/ has links of its own
BEST = "best"  # link to the best checkpoint, the only link in a run folder


def open_regular(path: Path, mode: str = "rb", follow: bool = False, buffering: int = 0) -> IO[bytes]:
    """Open a regular file as bytes. Raise OSError for a folder, pipe or device, and for a link.

    Args:
        mode: "rb", "ab" to append, or "xb" to create.
        follow: follow links, for a path that the user gives.
    """
    extra = getattr(os, "O_NONBLOCK", 0) | (0 if follow else getattr(os, "O_NOFOLLOW", 0))
    if not follow:
        require_no_link(path)  # for the message, and for Windows
    try:
        file = open(path, mode, buffering, opener=lambda name, flags: os.open(name, flags | extra, 0o666))  # noqa: SIM115
    except IsADirectoryError:
        raise
    except OSError as error:
        if error.errno == errno.ENXIO:  # a pipe that nobody reads
            raise OSError(errno.EINVAL, f"{path.name} is not a regular file") from error
        raise
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, f"{path.name} is not a regular file")
    return file


def read_bytes(path: Path, max_bytes: int, follow: bool = False) -> bytes:
    """Read a regular file; raise OSError if it has more than `max_bytes`."""
    with open_regular(path, follow=follow) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise OSError(errno.EFBIG, f"{path.name} has {size:,} bytes, more than the limit of {max_bytes:,}")
        parts, left = [], size  # files of /proc have size 0 and may never end
        while left and (part := file.read(left)):
            parts.append(part)
            left -= len(part)
        return b"".join(parts)


def require_no_link(path: Path) -> None:
    """Raise OSError if `path` is a link."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, LINK.format(path))


def require_no_links(run_dir: Path) -> None:
    """Raise OSError if a run folder holds a link besides that to the best checkpoint."""
    for folder in (run_dir, *(run_dir / name for name in FOLDERS)):
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_symlink() and (folder.name, entry.name) != ("checkpoints", BEST):
                    raise OSError(errno.ELOOP, LINK.format(entry.path))


@contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path, which replaces `path` if the block succeeds; readers see the old or the new content.

    A link at `path` is replaced, and not followed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with suppress(OSError):
        temporary.unlink()
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_atomically(path: Path, text: str) -> None:
    """Write a text file; readers see either the old or the new content."""
    require_no_link(path)
    with replace_atomically(path) as temporary:
        temporary.write_text(text, "utf-8")
