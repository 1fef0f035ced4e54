"""Executor `ray`: nodes of a Ray cluster, or this machine, that share the project's folder.

Every slot is an actor with its own server that has imported everything (see `workers`).
"""

import os
from collections.abc import Sequence
from typing import Any

from secateur.base import optional
from secateur.studies.execution.local import LocalExecutor, Outcome
from secateur.studies.execution.snapshot import Snapshot
from secateur.studies.execution.work import Task


class Node:
    """One slot, which runs one piece of work after the other."""

    def __init__(self, state: Snapshot, name: str, ignored: Sequence[str]) -> None:
        self.executor = LocalExecutor(state, 1, ignored, name)

    def do(self, task: Task) -> int:
        """Run a piece of work; returns its status."""
        self.executor.submit(task)
        (outcome,) = self.executor.wait()
        return outcome.status

    def close(self) -> None:
        """Interrupt the running piece, and end."""
        self.executor.close()


class RayExecutor:
    """Runs pieces on actors; an actor that dies is replaced."""

    def __init__(
        self,
        state: Snapshot,
        ignored: Sequence[str],
        slots: int | None = None,
        cpus: float = 1,
        gpus: float = 0,
    ) -> None:
        self.ray: Any = optional.load("ray", "for --executor ray", "ray")
        self.state, self.ignored = state, list(ignored)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if not self.ray.is_initialized():
            environment = {"env_vars": {"PYTHONPATH": str(state.root)}}
            self.ray.init(runtime_env=environment, log_to_driver=False, logging_level="error")
        resources = self.ray.cluster_resources()
        fits = [resources.get("CPU", 1) / cpus if cpus else 1]
        fits += [resources.get("GPU", 0) / gpus] if gpus else []
        self.slots = slots or max(1, int(min(fits)))
        self.kind = self.ray.remote(num_cpus=cpus, num_gpus=gpus, max_concurrency=2)(Node)
        self.free: list[tuple[int, Any]] = [(n, None) for n in range(self.slots)]
        self.running: dict[Any, tuple[str, int, Any]] = {}

    def submit(self, task: Task) -> None:
        """Assign a piece to a free actor."""
        number, node = self.free.pop()
        if node is None:
            node = self.kind.remote(self.state, f"ray-{number}", self.ignored)
        self.running[node.do.remote(task)] = (task.key, number, node)

    def wait(self, seconds: float | None = None) -> Sequence[Outcome]:
        """Pieces that have ended; an actor that died counts as killed."""
        done, _ = self.ray.wait(list(self.running), num_returns=1, timeout=seconds)
        found = []
        for reference in done:
            key, number, node = self.running.pop(reference)
            try:
                status = int(self.ray.get(reference))
            except self.ray.exceptions.RayActorError:
                status, node = -9, None
            self.free.append((number, node))
            found.append(Outcome(key, status))
        return found

    def close(self) -> None:
        """Interrupt running pieces, and release the actors."""
        nodes = [node for _, node in self.free if node is not None]
        nodes += [node for _, _, node in self.running.values()]
        for closing in [node.close.remote() for node in nodes]:
            try:
                self.ray.get(closing, timeout=40)
            except self.ray.exceptions.RayError:
                continue  # the actor has died
        for node in nodes:
            self.ray.kill(node)
