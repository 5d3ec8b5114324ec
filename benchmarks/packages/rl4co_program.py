"""Reinforcement learning of tours, on instances that are drawn in each epoch: fit and test."""

from reporting import QUIET, report, seed
from rl4co.envs import TSPEnv
from rl4co.models import REINFORCE, AttentionModelPolicy
from rl4co.utils import RL4COTrainer

seed()
environment = TSPEnv(generator_params={"num_loc": 6})
policy = AttentionModelPolicy(
    env_name="tsp", embed_dim=16, num_encoder_layers=1, num_heads=2
)
model = REINFORCE(
    environment,
    policy,
    baseline="rollout",
    batch_size=16,
    train_data_size=256,
    val_data_size=64,
    test_data_size=64,
    optimizer_kwargs={"lr": 1e-3},
)
trainer = RL4COTrainer(
    max_epochs=3, logger=None, precision="32-true", matmul_precision=None, **QUIET
)
trainer.fit(model)
report("fit", trainer.callback_metrics["val/reward"], drawn=True)
report("test", trainer.test(model, verbose=False)[0]["test/reward"], drawn=True)
