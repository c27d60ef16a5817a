"""The metrics, tables and pictures of a run, to every logger of the key `logger`. Neither a full disk nor a server that does not answer
breaks a step: with a full disk the run saves and ends after it, without a server it goes on."""

from __future__ import annotations

import csv
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from ..console import console
from ..errors import ConfigError, WriteError

PROJECT = "lit_eemllm"
"""Where runs are in W&B and MLflow, unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME says otherwise."""
MLFLOW = os.environ.get("MLFLOW_TRACKING_URI")
"""The user's server. Read now, since MLflow itself sets the variable."""


def _wandb(out: Path, version: int | str) -> Logger:
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    (out / "logs").mkdir(parents=True, exist_ok=True)  # else it writes elsewhere
    return WandbLogger(f"{out.name}, version {version}", out / "logs", project=project, group=str(out)[-128:])


def _mlflow(out: Path, version: int | str) -> Logger:
    folder = (out / "logs").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return MLFlowLogger(
        os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT),
        run_name=f"{out.name}, version {version}",
        tracking_uri=MLFLOW or f"sqlite:///{folder}/mlflow.db",
        artifact_location=None if MLFLOW else f"{folder}/mlflow",
    )


SERVERS: dict[str, Callable[[Path, int | str], Logger]] = {"wandb": _wandb, "mlflow": _mlflow}


class Logs(Logger):
    """All loggers of a run as one, which never raise in the middle of a step.

    Args:
        out: run directory.
        names: of the loggers, csv among them.

    Attributes:
        failed: the first write that failed, None so far; after it nothing is written. `Checkpoints` looks at it after every step.

    Raises ConfigError if a logger's package is not installed.
    """

    def __init__(self, out: Path, names: Sequence[str] = ("csv", "tensorboard")) -> None:
        super().__init__()
        self.csv = CSVLogger(out, name="logs", flush_logs_every_n_steps=1)
        self.loggers: dict[str, Any] = {"csv": self.csv}
        if "tensorboard" in names:
            board = TensorBoardLogger(out, name="logs", version=self.csv.version, default_hp_metric=False)
            self.loggers["tensorboard"] = board
        for name in names:
            if name in SERVERS:
                try:
                    self.loggers[name] = SERVERS[name](out, self.csv.version)
                except ModuleNotFoundError:
                    text = f"logger: found {name}, which is not installed: pip install 'lit_eemllm[{name}]'"
                    raise ConfigError(text) from None
        self.failed: WriteError | None = None

    @property
    def name(self) -> str:
        return self.csv.name

    @property
    def version(self) -> int | str:
        return self.csv.version

    @property
    def save_dir(self) -> str:
        return self.csv.save_dir

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._each(lambda _, logger: logger.log_metrics(dict(metrics), step))

    def log_hyperparams(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        self._each(lambda _, logger: logger.log_hyperparams(params))

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table of texts, which stays."""

        def log(kind: str, logger: Any) -> None:
            if kind == "csv":
                Path(logger.log_dir).mkdir(parents=True, exist_ok=True)
                with (Path(logger.log_dir) / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
                    csv.writer(file).writerows([columns, *rows])
            elif kind == "tensorboard":
                lines = [columns, ["---"] * len(columns), *rows]
                logger.experiment.add_text(name, "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines))
            elif kind == "wandb":
                logger.log_table(name, list(columns), [list(map(str, row)) for row in rows])
            else:
                content = {column: [str(row[i]) for row in rows] for i, column in enumerate(columns)}
                logger.experiment.log_table(logger.run_id, content, f"{name}.json")

        self._each(log)

    def log_picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """A picture of a step, where pictures are shown: everywhere but in CSV. picture: uint8 [height, width, 3]."""

        def log(kind: str, logger: Any) -> None:
            if kind == "tensorboard":
                logger.experiment.add_image(name, picture, step, dataformats="HWC")
            elif kind == "wandb":
                logger.log_image(name, [picture], step)
            elif kind == "mlflow":
                logger.experiment.log_image(logger.run_id, picture, key=name, step=step)

        self._each(log)

    def save(self) -> None:
        self._each(lambda _, logger: logger.save())

    def finalize(self, status: str) -> None:
        def end(kind: str, logger: Any) -> None:
            logger.finalize(status)
            if kind == "wandb":
                import wandb

                wandb.finish()  # else the next run of this process would go on in this one

        self._each(end)

    def _each(self, log: Callable[[str, Any], None]) -> None:
        """Do something with every logger."""
        for name, logger in list(self.loggers.items()):
            if name not in SERVERS:
                self.attempt(lambda name=name, logger=logger: log(name, logger))  # type: ignore[misc]
                continue
            try:
                log(name, logger)
            except Exception as error:  # noqa: BLE001  whatever a server or its client says, the training is worth more
                del self.loggers[name]
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                console.print(f"warning: {name} has failed, and gets nothing from here on: {reason}")

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
        except WriteError as error:
            self.failed = error
        except (OSError, ValueError) as error:  # TensorBoard raises ValueError from OSError
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError):
                raise
            where = what or self.csv.log_dir
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
