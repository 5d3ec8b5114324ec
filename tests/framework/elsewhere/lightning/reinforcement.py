"""A deep Q network in a world of seven places, which fills its own memory."""

from collections import OrderedDict, deque, namedtuple

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.utils.data import DataLoader
from torch.utils.data.dataset import IterableDataset

Experience = namedtuple(
    "Experience", ["state", "action", "reward", "done", "new_state"]
)


class Corridor:
    """Right ends at the goal, left at the wall."""

    def reset(self):
        self.place = 3
        return self.state()

    def state(self):
        return np.eye(7, dtype=np.float32)[self.place]

    def step(self, action):
        self.place += 1 if action else -1
        done = self.place in (0, 6)
        return self.state(), float(self.place == 6), done


class ReplayBuffer:
    def __init__(self, capacity: int) -> None:
        self.buffer = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self.buffer)

    def append(self, experience: Experience) -> None:
        self.buffer.append(experience)

    def sample(self, batch_size: int):
        indices = np.random.choice(len(self.buffer), batch_size, replace=False)
        columns = zip(*(self.buffer[idx] for idx in indices), strict=True)
        states, actions, rewards, dones, next_states = columns
        return (
            np.array(states),
            np.array(actions),
            np.array(rewards, dtype=np.float32),
            np.array(dones, dtype=bool),
            np.array(next_states),
        )


class RLDataset(IterableDataset):
    def __init__(self, buffer: ReplayBuffer, sample_size: int = 40) -> None:
        self.buffer = buffer
        self.sample_size = sample_size

    def __iter__(self):
        yield from zip(*self.buffer.sample(self.sample_size), strict=True)


class DQNLightning(LightningModule):
    def __init__(self, batch_size: int = 8, gamma: float = 0.9, sync_rate: int = 4):
        super().__init__()
        self.save_hyperparameters()
        self.env = Corridor()
        self.net = nn.Linear(7, 2)
        self.target_net = nn.Linear(7, 2)
        self.target_net.requires_grad_(False)
        self.buffer = ReplayBuffer(200)
        self.state = self.env.reset()
        self.total_reward = 0.0
        for _ in range(100):
            self.play(epsilon=1.0)

    def play(self, epsilon: float) -> float:
        if np.random.random() < epsilon:
            action = np.random.randint(2)
        else:
            with torch.no_grad():
                action = int(self.net(torch.tensor(self.state)).argmax())
        new_state, reward, done = self.env.step(action)
        self.buffer.append(Experience(self.state, action, reward, done, new_state))
        self.state = self.env.reset() if done else new_state
        return reward

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch, nb_batch) -> OrderedDict:
        states, actions, rewards, dones, next_states = batch
        self.total_reward += self.play(epsilon=0.1)
        values = self(states).gather(1, actions.long().unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            next_values = self.target_net(next_states).max(1)[0]
            next_values[dones] = 0.0
        expected = next_values * self.hparams.gamma + rewards
        loss = nn.functional.mse_loss(values, expected)
        if self.global_step % self.hparams.sync_rate == 0:
            self.target_net.load_state_dict(self.net.state_dict())
        self.log_dict({"train_loss": loss, "total_reward": self.total_reward})
        return loss

    def configure_optimizers(self) -> Optimizer:
        return Adam(self.net.parameters(), lr=0.05)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(RLDataset(self.buffer), batch_size=self.hparams.batch_size)


if __name__ == "__main__":
    seed_everything(0)
    model = DQNLightning()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=20,
        val_check_interval=None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(model)
    best = model(torch.eye(7)[1:6]).argmax(1)
    assert trainer.current_epoch == 20
    assert best[-1] == 1, "beside the goal, the way is right"
