"""MLflow: a tracking server that MLFLOW_TRACKING_URI names, or else a database and files in the run's folder."""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune.runtime.errors import UserError
from finetune.runtime.files import writing
from finetune.tracking.names import grouped
from finetune.tracking.packages import imported

_AT_ONCE = 1000  # metrics in one call, the most that MLflow takes


class MLflow:
    """A run in the experiment that is called as the project. A resumed run continues under the same id."""

    def __init__(self, folder: Path, project: str, name: str, recipe: str) -> None:
        """
        Args:
            folder: the run's, for the note of MLflow's run id, and for its database where no server is named.
            recipe: its text, kept as the artifact recipe.toml.
        Raises:
            UserError: the package is missing, or MLflow cannot start.
        """
        mlflow = imported("mlflow", "mlflow")
        self._entities = imported("mlflow.entities", "mlflow")
        for logger in ("mlflow", "alembic"):
            logging.getLogger(logger).setLevel(logging.WARNING)
        uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        if not uri:  # its plain files are in maintenance mode, and refused by default since MLflow 3.7
            for package in ("sqlalchemy", "alembic"):
                imported(package, "mlflow")
            home = (folder / "mlflow").absolute()
            with writing(home):
                home.mkdir(parents=True, exist_ok=True)
            uri, artifacts = f"sqlite:///{home / 'mlflow.db'}", (home / "artifacts").as_uri()
        marker = folder / "mlflow_run_id"
        try:
            self.client = mlflow.MlflowClient(tracking_uri=uri)
            self.run_id = self._resumed(marker) or self._begun(project, name, artifacts)
            self.client.log_text(self.run_id, recipe, "recipe.toml")
        except mlflow.exceptions.MlflowException as error:
            reason = str(error).partition("\n")[0]
            cure = (
                "set MLFLOW_TRACKING_URI to a server that is there, or unset it to have a database in the run's folder"
            )
            raise UserError(f"MLflow cannot start ({reason})", cure, "tracking.trackers") from error
        with writing(marker):
            marker.write_text(self.run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = time.time_ns() // 1_000_000
        metrics = [self._entities.Metric(grouped(name), float(value), now, step) for name, value in values.items()]
        for first in range(0, len(metrics), _AT_ONCE):
            self.client.log_batch(self.run_id, metrics=metrics[first : first + _AT_ONCE])

    def log_videos(self, step: int, videos: Sequence[tuple[str, Path]], sheet: Path) -> None:
        for path in (*(path for _, path in videos), sheet):
            self.client.log_artifact(self.run_id, str(path), f"samples/step_{step:08d}")

    def close(self, failed: bool) -> None:
        self.client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")

    def _resumed(self, marker: Path) -> str | None:
        """The id of the run that is continued; None if there is none, here or where it was."""
        if not marker.exists():
            return None
        run_id = marker.read_text().strip()
        self.client.update_run(run_id, status="RUNNING")
        return run_id

    def _begun(self, project: str, name: str, artifacts: str | None) -> str:
        known = self.client.get_experiment_by_name(project)
        experiment = known.experiment_id if known else self.client.create_experiment(project, artifacts)
        return str(self.client.create_run(experiment, run_name=name).info.run_id)
