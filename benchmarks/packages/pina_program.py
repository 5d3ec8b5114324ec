"""A supervised solver: train, test, resume."""

import torch
from pina import Trainer
from pina.model import FeedForward
from pina.problem.zoo import SupervisedProblem
from pina.solver import SupervisedSolver
from reporting import report, seed

seed()
points = torch.linspace(0, 1, 40).reshape(-1, 1)
problem = SupervisedProblem(points, torch.sin(6 * points))
options = {
    "accelerator": "cpu",
    "batch_size": None,
    "enable_progress_bar": False,
    "train_size": 0.8,
    "val_size": 0.1,
    "test_size": 0.1,
    "shuffle": False,
    "default_root_dir": ".",
}


def solver() -> SupervisedSolver:
    seed()
    model = FeedForward(1, 1, inner_size=16, n_layers=2)
    return SupervisedSolver(problem, model, use_lt=False)


trainer = Trainer(solver(), max_epochs=20, **options)
trainer.train()
metrics = trainer.callback_metrics
report("fit", [metrics[name] for name in sorted(metrics)])
tested = trainer.test(verbose=False)[0]
report("test", [tested[name] for name in sorted(tested)])
path = trainer.checkpoint_callback.best_model_path
trainer = Trainer(solver(), max_epochs=30, **options)
trainer.train(ckpt_path=path, weights_only=False)
metrics = trainer.callback_metrics
report("resume", [metrics[name] for name in sorted(metrics)], trainer.current_epoch)
