"""One process at a time writes a run folder."""

import fcntl
import os
import socket
from pathlib import Path

from argrpo.run_folder import storage_error


class RunLock:
    """The lock of a run folder, held from when it is made until `release`.

    It is the kernel's, on an open file (flock): however the process ends, it ends with it, and a
    file that a dead process left is no lock.
    """

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            ValueError: another process holds it, or this one does already.
            StorageError: the disk is full or refused.
        """
        self._path = folder / ".lock"
        self._file: int | None = None
        while self._file is None:
            self._file = self._locked(folder)

    def release(self) -> None:
        """Let others have it, and leave no file behind."""
        if self._file is not None:
            # Before it is let go; `_locked` sees that it is no longer the file of that name.
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None

    def _locked(self, folder: Path) -> int | None:
        """The locked file; None where its holder removed it meanwhile."""
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(file, 200).decode(errors="replace").strip() or "another process"
            os.close(file)
            raise ValueError(
                f"output_dir: expected a folder that no other run is writing, got {folder}, in use "
                f"by {holder}; wait until that ends, or choose another"
            ) from error
        if not self._path.exists() or os.stat(self._path).st_ino != os.fstat(file).st_ino:
            os.close(file)
            return None
        try:
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError as error:
            self._path.unlink(missing_ok=True)
            os.close(file)
            raise storage_error(self._path, error) from error
        return file
