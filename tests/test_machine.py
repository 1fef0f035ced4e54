"""Devices and processes: valid values of SECATEUR_DEVICE and of the launchers' variables."""

import pytest

from secateur.base import machine
from secateur.base.errors import SettingsError

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "RANK": "3",
    "LOCAL_RANK": "1",
}
SRUN = {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NUM_NODES": "3", "SLURM_PROCID": "5"}


@pytest.mark.parametrize(
    ("variables", "found"), [(TORCHRUN, (4, 2, 2)), (SRUN, (6, 2, 3)), ({}, (1, 1, 1))]
)
def test_processes_are_those_that_the_launcher_has_set(variables, found, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert machine.processes() == found


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        (TORCHRUN | {"WORLD_SIZE": "many"}, "WORLD_SIZE = 'many': a whole number from 1 to"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE = '0': a whole number from 1"),
        (TORCHRUN | {"WORLD_SIZE": "5"}, "WORLD_SIZE = 5: must be a multiple of LOCAL_WORLD_SIZE"),
        (TORCHRUN | {"RANK": "4"}, "RANK = '4': a whole number from 0 to 3 is needed, as torchrun"),
        (TORCHRUN | {"LOCAL_RANK": ""}, "LOCAL_RANK = '': a whole number from 0 to 1"),
        (TORCHRUN | {"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE = '999.*: a whole number"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "-2"}, "SLURM_STEP_NUM_TASKS = '-2': .*, as srun sets it"),
        (SRUN | {"SLURM_STEP_NUM_NODES": "0"}, "SLURM_STEP_NUM_NODES = '0': a whole number"),
        (SRUN | {"SLURM_STEP_NUM_NODES": "4"}, "SLURM_STEP_NUM_TASKS = 6: must be a multiple of"),
        ({"SLURM_PROCID": "z"}, "SLURM_PROCID = 'z': a whole number from 0"),
        ({"SLURM_NTASKS": "²"}, "SLURM_NTASKS = '²': a whole number from 0"),
    ],
)
def test_variables_that_no_launcher_sets_so_are_named(variables, line, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=f"^{line}") as caught:
        machine.processes()
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("device", "line"),
    [
        ("meta", "trainings cannot run there; allowed: cpu, cuda, mps"),
        ("x" * 1000, "not usable here: "),
        ("cuda:9999", "not usable here: "),
    ],
)
def test_a_device_that_cannot_train_is_named(device, line, monkeypatch):
    monkeypatch.setenv("SECATEUR_DEVICE", device)
    with pytest.raises(SettingsError, match=f"^SECATEUR_DEVICE = '[^\n]*: {line}") as caught:
        machine.device()
    assert len(str(caught.value)) < 300
