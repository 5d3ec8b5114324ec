"""A loop in plain PyTorch that learns to read digits. Compare it with engine_loop.py."""

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
pixels, digits = load_digits(return_X_y=True)
images = torch.tensor(pixels, dtype=torch.float32) / 16
labels = torch.tensor(digits)
loader = DataLoader(TensorDataset(images, labels), batch_size=32)
model = torch.nn.Sequential(
    torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

for epoch in range(5):
    for images, labels in loader:
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch}: loss {loss.item():.6f}")
