"""A worker's part in reading and writing the checkpoints of a run."""

from __future__ import annotations

from pathlib import Path

from actors.host.expert_host import ExpertHost
from actors.trunk import TrunkWorker
from actors.trunk.parameters import TrunkParameters
from jobs.checkpoints.checkpoint_store import CheckpointStore, TrainingState
from jobs.checkpoints.trunk_checkpoint import load_trunk_moments, save_trunk
from jobs.config.run_config import RunConfig
from jobs.data.corpus import PreparedData
from jobs.training.held_out_evaluation import Validation
from jobs.training.run_start import RunStart, weight_source
from jobs.training.step_coordinator import StepCoordinator
from jobs.training.worker_group import WorkerGroup
from model.checkpoints.pretrained import require_experts, write_index, write_model_config


def load_trunk(parameters: TrunkParameters, config: RunConfig, start: RunStart) -> None:
    """Set a trunk's weights, and the optimizer's moments if the run starts with some.

    Raises:
        CheckpointError: They do not fit the model.
    """
    parameters.begin(weight_source(config, start), start.step)
    if start.moments and start.weights is not None:
        load_trunk_moments(start.weights, parameters, step=start.step)


class WorkerCheckpoints:
    """Writes a run's checkpoints, and loads one of them into the worker's trunk.

    Args:
        config: The run's configuration.
        data: The run's documents and tokenizer.
        group: This worker's place among the workers.
        start: Where the run started; its checkpoint is never deleted, because new processes read it.
        output: The run's directory.
        trunk: The worker's trunk.
        coordinator: Has the expert hosts write their part.
        experts: The experts of this process; None if they are on hosts.
    """

    def __init__(
        self,
        config: RunConfig,
        data: PreparedData,
        *,
        group: WorkerGroup,
        start: RunStart,
        output: Path,
        trunk: TrunkWorker,
        coordinator: StepCoordinator,
        experts: ExpertHost | None,
    ) -> None:
        self._config, self._data, self._group, self._start = config, data, group, start
        self._trunk, self._coordinator, self._experts = trunk, coordinator, experts
        keep = config.checkpoint.keep
        self._store = CheckpointStore(output / "checkpoints", keep=keep, needed=start.weights)

    def restart(self, directory: str) -> None:
        """Load a checkpoint of the run, or with an empty name the weights that the run started with."""
        load_trunk(self._trunk.parameters, self._config, self._start.at(directory))

    def write(self, step: int, validation: Validation | None) -> None:
        """Write the checkpoint after `step` steps; all workers call this together.

        Worker 0 writes the trunk and commits the checkpoint, and no later step commits before it returns.

        Args:
            validation: Result of the last evaluation, if there was one.
        """
        parameters = self._trunk.parameters
        self._trunk.agreement.meet()
        if self._group.rank:
            save_trunk(None, parameters)
            return
        directory = self._store.begin(step)
        save_trunk(directory, parameters)
        if self._experts is not None:
            self._experts.save(str(directory))
        else:
            self._coordinator.save(str(directory), step)
        write_model_config(directory, self._config.model, dtype=self._trunk.dtype)
        self._data.save_tokenizer(directory)
        write_index(directory)
        require_experts(directory, self._config.model)
        self._store.commit(
            step,
            TrainingState(
                step=step,
                bias_version=step,
                config=self._config.to_dict(),
                validation=None if validation is None else {"loss": validation.loss},
            ),
        )


__all__ = ["WorkerCheckpoints", "load_trunk"]
