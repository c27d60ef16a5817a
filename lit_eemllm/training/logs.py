"""The metrics of a run, as CSV and for TensorBoard. A full disk does not break a step: the run saves and ends after it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from ..errors import WriteError


class Logs(Logger):
    """Both loggers as one, which never raise in the middle of a step.

    Args:
        out: run directory.

    Attributes:
        failed: the first write that failed, None so far; after it nothing is written. `Checkpoints` looks at it after every step.
    """

    def __init__(self, out: Path) -> None:
        super().__init__()
        csv = CSVLogger(out, name="logs", flush_logs_every_n_steps=1)
        board = TensorBoardLogger(out, name="logs", version=csv.version, default_hp_metric=False)
        self.loggers = csv, board
        self.failed: WriteError | None = None

    @property
    def name(self) -> str:
        return self.loggers[0].name

    @property
    def version(self) -> int | str:
        return self.loggers[0].version

    @property
    def save_dir(self) -> str:
        return self.loggers[0].save_dir

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for logger in self.loggers:
            self.attempt(lambda logger=logger: logger.log_metrics(dict(metrics), step))  # type: ignore[misc]

    def log_hyperparams(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        for logger in self.loggers:
            self.attempt(lambda logger=logger: logger.log_hyperparams(params))  # type: ignore[misc]

    def save(self) -> None:
        for logger in self.loggers:
            self.attempt(logger.save)

    def finalize(self, status: str) -> None:
        for logger in self.loggers:
            self.attempt(lambda logger=logger: logger.finalize(status))  # type: ignore[misc]

    def attempt(self, write: Callable[[], None], what: str | None = None) -> None:
        """Write something, unless a write has failed before.

        Args:
            write: does it.
            what: what is written, for the message; default: the log.
        """
        if self.failed is not None:
            return
        try:
            write()
        except BrokenPipeError:  # the reader of a pipe is gone: not a disk error
            raise
        except (OSError, ValueError) as error:  # TensorBoard raises ValueError from OSError
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError):
                raise
            where = what or self.loggers[0].log_dir
            self.failed = WriteError(f"{cause.filename or where} could not be written: {cause.strerror or cause}")


@contextmanager
def quiet_threads() -> Iterator[None]:
    """Do not print OSErrors of threads: TensorBoard's writer thread also reports its failure with the next value."""
    before = threading.excepthook
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else before(args)
    try:
        yield
    finally:
        threading.excepthook = before
