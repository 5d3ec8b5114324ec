"""Trackers, checkpoints by steps, and a loop that goes on inside an epoch."""

import os

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, set_seed
from torch.utils.data import DataLoader, TensorDataset

logger = get_logger(__name__)


def training_function(config, resume_from_checkpoint=None):
    accelerator = Accelerator(
        cpu=True,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        log_with="tensorboard",
        project_config=ProjectConfiguration(
            project_dir="project", logging_dir="project/logs"
        ),
    )
    accelerator.init_trackers("complete_nlp", config)
    set_seed(config["seed"])
    x = torch.randn(64, 4)
    data = TensorDataset(x, x.sum(1, keepdim=True))
    train_dataloader = DataLoader(data, shuffle=True, batch_size=8)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"])
    lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)
    model, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, lr_scheduler
    )
    overall_step = 0
    starting_epoch = 0
    resume_step = None
    if resume_from_checkpoint:
        accelerator.print(f"Resumed from checkpoint: {resume_from_checkpoint}")
        accelerator.load_state(resume_from_checkpoint)
        path = os.path.basename(resume_from_checkpoint)
        resume_step = int(path.replace("step_", ""))
        starting_epoch = resume_step // len(train_dataloader)
        resume_step -= starting_epoch * len(train_dataloader)
    losses = []
    for epoch in range(starting_epoch, config["num_epochs"]):
        model.train()
        total_loss = 0
        active_dataloader = train_dataloader
        if resume_from_checkpoint and epoch == starting_epoch and resume_step:
            active_dataloader = accelerator.skip_first_batches(
                train_dataloader, resume_step
            )
            overall_step += resume_step
        for inputs, targets in active_dataloader:
            loss = (model(inputs) - targets).square().mean()
            total_loss += loss.detach().float()
            losses.append(loss.item())
            accelerator.backward(loss)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            overall_step += 1
            if overall_step == config["checkpointing_step"]:
                accelerator.save_state(os.path.join("complete", f"step_{overall_step}"))
        accelerator.log(
            {"train_loss": total_loss.item() / len(train_dataloader), "epoch": epoch},
            step=epoch,
        )
    logger.info("trained", main_process_only=True)
    accelerator.end_training()
    return losses, len(train_dataloader)


if __name__ == "__main__":
    settings = {"lr": 1e-2, "num_epochs": 2, "seed": 3, "checkpointing_step": 3}
    whole, length = training_function(settings)
    rest, _ = training_function(settings, os.path.join("complete", "step_3"))
    assert len(whole) == 2 * length
    assert rest[: length - 3] == whole[3:length]
