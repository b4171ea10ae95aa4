"""`MLFlowLogger`: records a run with MLflow, in a local database or on a tracking server.

Everything but the start of the run goes through a `Sender`, since a tracking server answers in its own time.
"""

from __future__ import annotations

import functools
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nnx_fit.errors import ConfigurationError
from nnx_fit.loggers.curves import pr_curve
from nnx_fit.loggers.hyperparams import flatten
from nnx_fit.loggers.logger import Logger, Status
from nnx_fit.loggers.pixels import as_many_pixels, as_pixels
from nnx_fit.loggers.projector import as_points, write_embedding
from nnx_fit.loggers.sending import Sender

_STATUS: dict[Status, str] = {"success": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
# What MLflow takes in one call, and in one value.
_MOST_METRICS, _MOST_PARAMS, _LONGEST_PARAM = 1000, 100, 6000
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE", "PERMISSION_DENIED")
_PATIENCE = 60.0  # seconds that the end of a run waits for the store


class MLFlowLogger(Logger):
    """Records scalars, hyperparameters, and as artifacts text, images, figures, embeddings and curves with MLflow.

    The step of every metric is `global_step`. The run begins with the first record. Metrics are sent in batches from a
    thread; the training loop does not wait for the store, and the end of a run for a minute at most. While the store is
    away they are kept, and sent when it is back. Characters that MLflow does not allow in names become `_`.

    A fit that continues from a checkpoint continues the last run of the experiment that has its `run_name`, or the
    one of `run_id`. MLflow never changes a parameter of a run: settings that are different then are recorded as tags
    `resumed.<name>`. Nor does it drop what that run had logged after the checkpoint.

    Args:
        experiment_name: Experiment, which is created where it does not exist.
        run_name: Name of the run; default: one that MLflow makes up.
        tracking_uri: Where the store is, for example `http://localhost:5000`. Default: `MLFLOW_TRACKING_URI`, or else
            the SQLite database `mlflow.db` in `save_dir`; look at it with
            `mlflow ui --backend-store-uri sqlite:///mlruns/mlflow.db`.
        tags: Tags of the run.
        save_dir: Directory of the database and the artifacts; of no effect with a `tracking_uri`.
        prefix: What the names of metrics begin with.
        artifact_location: Where the artifacts of an experiment that is created go.
        run_id: Id of a run to continue.

    Raises:
        ConfigurationError: MLflow is not installed.

    Example:
        >>> from nnx_fit.loggers.mlflow import MLFlowLogger
        >>> logger = MLFlowLogger("digits", run_name="wide")  # doctest: +SKIP
    """

    def __init__(
        self,
        experiment_name: str = "nnx_fit",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        tags: Mapping[str, Any] | None = None,
        save_dir: str | Path = "./mlruns",
        *,
        prefix: str = "",
        artifact_location: str | None = None,
        run_id: str | None = None,
    ):
        if find_spec("mlflow") is None:
            raise ConfigurationError(
                'MLFlowLogger needs MLflow, which is not installed. Fix: pip install "nnx-fit[mlflow]"'
            )
        self.name = experiment_name
        self.run_name = run_name
        self.save_dir = Path(save_dir)
        self.tracking_uri = tracking_uri
        self.tags = {str(name): str(value) for name, value in (tags or {}).items()}
        self.prefix = prefix
        self.artifact_location = artifact_location
        self.run_id = run_id
        self.version = run_id
        self._client: Any = None
        self._sender: Any = None
        self._continues = False
        self._params: dict[str, str] = {}

    @property
    def experiment(self) -> Any:
        """The `mlflow.MlflowClient`; the run, whose id is `run_id`, begins with the first use."""
        self._require_run()
        return self._client

    def continue_from(self, step: int) -> None:
        """Says that this run continues an earlier one; see the class."""
        self._continues = step >= 0

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Records scalars of one step."""
        if not metrics:
            return
        sender = self._require_run()
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        sender.put(
            [Metric(_allowed(f"{self.prefix}{name}"), float(value), now, step) for name, value in metrics.items()]
        )

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Records the run's settings as parameters, nested ones with dotted names."""
        sender = self._require_run()
        from mlflow.entities import Param

        values = {_allowed(name): str(value)[:_LONGEST_PARAM] for name, value in flatten(params).items()}
        new = [Param(name, value) for name, value in values.items() if name not in self._params]
        for start in range(0, len(new), _MOST_PARAMS):
            some = new[start : start + _MOST_PARAMS]
            sender.call(functools.partial(self._client.log_batch, self.run_id, params=some))
        for name, value in values.items():
            if self._params.get(name, value) != value:
                sender.call(functools.partial(self._client.set_tag, self.run_id, f"resumed.{name}", value))
        self._params |= values

    def log_text(self, tag: str, text: str, step: int = 0) -> None:
        """Records text as the artifact `<tag>.md`."""
        sender = self._require_run()
        sender.call(functools.partial(self._client.log_text, self.run_id, text, f"{_allowed(tag)}.md"))

    def log_image(self, tag: str, image: Any, step: int) -> None:
        """Records an image; see `Logger.log_image`."""
        pixels = as_pixels(tag, image)
        sender = self._require_run()
        send = functools.partial(self._client.log_image, self.run_id, pixels, synchronous=True)
        sender.call(functools.partial(send, key=_allowed(tag), step=step))

    def log_embedding(
        self, tag: str, vectors: Any, step: int, metadata: Sequence[Any] | None = None, images: Any = None
    ) -> None:
        """Records the files of TensorBoard's projector as artifacts; see `Logger.log_embedding`."""
        points = as_points(tag, vectors, metadata)
        pictures = None if images is None else as_many_pixels(tag, images, len(points))
        sender = self._require_run()

        def send() -> None:
            with tempfile.TemporaryDirectory() as directory:
                write_embedding(Path(directory), tag, points, step, metadata, pictures)
                self._client.log_artifacts(self.run_id, str(Path(directory, "embeddings")), "embeddings")

        sender.call(send)

    def log_pr_curve(self, tag: str, labels: Any, probabilities: Any, step: int) -> None:
        """Records precision, recall and counts at 127 thresholds as an artifact; see `Logger.log_pr_curve`."""
        curve = {name: values.tolist() for name, values in pr_curve(tag, labels, probabilities)._asdict().items()}
        sender = self._require_run()
        file = f"pr_curves/{_allowed(tag)}-{step}.json"
        sender.call(functools.partial(self._client.log_dict, self.run_id, curve, file))

    def flush(self) -> None:
        """Waits until the store has everything."""
        if self._sender is not None:
            self._sender.drain(_PATIENCE)

    def finalize(self, status: Status) -> None:
        """Says how the run ended, and waits until the store has everything."""
        if self._sender is not None:
            self._sender.call(functools.partial(self._client.set_terminated, self.run_id, _STATUS[status]))
            self._sender.drain(_PATIENCE)

    def _require_run(self) -> Any:
        if self._sender is None:
            try:
                self._client = self._connect()
                self.run_id = self.version = self._begin()
            except ConfigurationError:
                raise
            except Exception as error:
                raise ConfigurationError(
                    f"MLFlowLogger cannot start a run in {self._uri}: {error}\n"
                    "Fix: check tracking_uri and that the server is up; a local database needs "
                    '`pip install "nnx-fit[mlflow]"`.'
                ) from error
            self._sender = Sender(self._send_metrics, _is_refused, _MOST_METRICS)
        return self._sender

    @property
    def _uri(self) -> str:
        given = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        return given or f"sqlite:///{self.save_dir.resolve() / 'mlflow.db'}"

    def _connect(self) -> Any:
        from mlflow.tracking import MlflowClient

        with self._alone():
            return MlflowClient(self._uri)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Lets one process at a time make the database: MLflow's tables get damaged when two do."""
        if not self._is_own_database:
            yield
            return
        self.save_dir.mkdir(parents=True, exist_ok=True)
        with (self.save_dir / ".mlflow.lock").open("a") as lock:
            try:
                import fcntl
            except ImportError:  # only POSIX has it
                yield
                return
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield  # closing the file ends it

    @property
    def _is_own_database(self) -> bool:
        return not (self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"))

    def _begin(self) -> str:
        """Creates the run, or opens the one that is continued; returns its id."""
        experiment_id = self._experiment_id()
        run_id = self.run_id or (self._earlier_run(experiment_id) if self._continues else None)
        if run_id is None:
            run = self._client.create_run(experiment_id, run_name=self.run_name, tags=self.tags)
            return run.info.run_id
        self._params = dict(self._client.get_run(run_id).data.params)
        self._client.update_run(run_id, status="RUNNING")
        return run_id

    def _experiment_id(self) -> str:
        found = self._client.get_experiment_by_name(self.name)
        if found is not None:
            return found.experiment_id
        location = self.artifact_location
        if location is None and self._is_own_database:
            location = (self.save_dir.resolve() / "artifacts").as_uri()
        with self._alone():
            found = self._client.get_experiment_by_name(self.name)
            return found.experiment_id if found else self._client.create_experiment(str(self.name), location)

    def _earlier_run(self, experiment_id: str) -> str | None:
        if self.run_name is None:
            return None
        name = self.run_name.replace("'", "\\'")
        query = f"attributes.run_name = '{name}'"
        order = ["attributes.start_time DESC"]
        runs = self._client.search_runs([experiment_id], query, max_results=1, order_by=order)
        return runs[0].info.run_id if runs else None

    def _send_metrics(self, metrics: list[Any]) -> None:
        self._client.log_batch(self.run_id, metrics=metrics)


def _is_refused(error: Exception) -> bool:
    """Whether the store is there and does not take this; the network, and a database that is busy, come back."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code in _REFUSALS
    return not isinstance(error, OSError)


def _allowed(name: str) -> str:
    """A name with nothing in it that MLflow refuses."""
    return re.sub(r"[^\w\-./ :]", "_", name).strip("/") or "_"
