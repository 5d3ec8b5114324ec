"""Its own training program, configured by Hydra: train with checkpoints of the best, and test."""

import sys
from pathlib import Path

import ase.build
import ase.io
import lightning.pytorch as pl
import numpy as np
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from nequip.scripts.train import main
from reporting import report, seed

seed()
random = np.random.RandomState(0)
frames = []
for _ in range(12):
    atoms = ase.build.bulk("Cu", cubic=True)
    atoms.positions += random.randn(*atoms.positions.shape) * 0.05
    atoms.calc = EMT()
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
    frames.append(atoms)
ase.io.write("frames.xyz", frames, format="extxyz")

# Its program returns nothing, so the results are read where the trainer has them.
results = {}
fit, test = pl.Trainer.fit, pl.Trainer.test


def fit_and_keep(self, *args, **kwargs):
    fit(self, *args, **kwargs)
    results["fit"] = dict(self.callback_metrics)


def test_and_keep(self, *args, **kwargs):
    results["test"] = test(self, *args, **kwargs)
    return results["test"]


pl.Trainer.fit, pl.Trainer.test = fit_and_keep, test_and_keep
sys.argv = ["nequip-train", "-cp", str(Path(__file__).parent), "-cn", "nequip"]
main()
report("fit", results["fit"]["val0_epoch/forces_rmse"])
tested = results["test"][0]
report("test", [tested[name] for name in sorted(tested)])
