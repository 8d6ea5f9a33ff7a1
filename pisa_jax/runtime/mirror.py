"""Local files of a run that are copied to its run directory in a bucket at intervals."""

import logging
import tempfile
import threading
from pathlib import Path

from pisa_jax.runtime.messages import error_text
from pisa_jax.runtime.remote_paths import AnyPath, copy_file, is_bucket

logger = logging.getLogger(__name__)

UPLOAD_SECONDS = 60.0


class Mirror:
    """A local folder for files that grow during a run: of a local `target` itself, of one in a bucket a temporary one.

    A thread copies the files of a temporary folder to the bucket when they have changed; a bucket cannot append to
    objects. An upload that fails is reported once and repeated: logs are no reason to stop a run.
    """

    def __init__(self, target: AnyPath, interval: float = UPLOAD_SECONDS):
        self._target, self._interval = target, interval
        self._temporary = tempfile.TemporaryDirectory(prefix="pisa_jax_") if is_bucket(target) else None
        self.local = Path(self._temporary.name) if self._temporary else target
        # Sizes of the files when they were last copied.
        self._copied: dict[Path, int] = {}
        self._reported = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._copy_at_intervals, daemon=True, name="mirror")
        if self._temporary:
            self._thread.start()

    def _copy_at_intervals(self) -> None:
        while not self._closing.wait(self._interval):
            self._copy()

    def _copy(self) -> None:
        for path in sorted(self.local.rglob("*")):
            try:
                if not path.is_file() or path.name.startswith("."):
                    continue
                size = path.stat().st_size  # before the copy: what is appended meanwhile is copied next time
                if self._copied.get(path) != size or path.suffix == ".json":
                    copy_file(path, self._target / path.relative_to(self.local).as_posix())
                    self._copied[path], self._reported = size, False
            except Exception as error:
                if not self._reported:
                    logger.warning("%s could not be copied to %s: %s", path.name, self._target, error_text(error)[:300])
                self._reported = True

    def close(self) -> None:
        """Copy what has changed, and end the thread."""
        if self._temporary and not self._closing.is_set():
            self._closing.set()
            self._thread.join()
            self._copy()
            self._temporary.cleanup()
