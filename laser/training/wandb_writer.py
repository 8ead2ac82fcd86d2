"""Weights & Biases as one more place for the numbers of a run: training.wandb_project.

Needs requirements-wandb.txt, and an account or WANDB_MODE=offline, which writes to the run's folder
for `wandb sync`. A run keeps its id over restarts; steps that are done again have been told
already, and W&B leaves them out.
"""

import importlib.util
import uuid
from collections.abc import Mapping
from typing import Any

from data.errors import first_line
from laser.training.folders import write_atomically
from laser.training.records import Records

ID_FILE = "wandb-id"


def check_installed(project: str) -> None:
    """Raises ValueError if there is a project and no wandb."""
    if project and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"training.wandb_project={project}: wandb is not installed; "
            "pip install -r requirements-wandb.txt"
        )


class WandbWriter:
    """A `MetricsWriter`.

    Args:
      project: that the run belongs to; made if it is not there.
      records: of the run.
      config: every field.

    Raises OSError if Weights & Biases takes no run.
    """

    def __init__(self, project: str, records: Records, config: Mapping[str, Any]):
        import wandb

        path = records.workdir / ID_FILE
        if not path.exists():
            write_atomically(path, uuid.uuid4().hex)
        try:
            self._run = wandb.init(
                project=project,
                id=path.read_text(),
                name=records.workdir.name,
                resume="allow",
                dir=records.folder,
                config=dict(config),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.Error as error:
            raise OSError(
                f"training.wandb_project={project}: {first_line(error)}; log in, or set "
                "WANDB_MODE=offline"
            ) from error

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()
