"""A script in plain PyTorch: which patients stay longer than a week. By hand: `python plain.py --ward 1`.

A federation adds the five lines that are marked; by hand they do nothing.
"""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedclient import trainer as fed  # federated


def patients(ward: int, count: int, first: int = 0) -> TensorDataset:
    """Stands for a ward's own file: ten measurements, and whether the patient stayed."""
    generator = torch.Generator().manual_seed(1000 * ward + first)
    measured = torch.randn(count, 10, generator=generator) + ward / 10
    stayed = (measured[:, :3].sum(1) + torch.randn(count, generator=generator) > 0).float()
    return TensorDataset(measured, stayed)


def measure(model: nn.Module) -> dict[str, float]:
    """Loss and accuracy on patients that were not learned from."""
    x, y = test.tensors
    with torch.no_grad():
        logits = model(x).squeeze(1)
    loss = nn.functional.binary_cross_entropy_with_logits(logits, y)
    accuracy = ((logits > 0) == (y > 0)).float().mean()
    return {"loss": float(loss), "accuracy": float(accuracy), "num_examples": len(test)}


parser = argparse.ArgumentParser()
parser.add_argument("--ward", type=int, default=1)
parser.add_argument("--epochs", type=int, default=2)
learning_rate = fed.setting("learning_rate", 0.05, minimum=0)  # federated
args = parser.parse_args()

train, test = patients(args.ward, 200), patients(args.ward, 100, first=200)
model = nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 1))
fed.load(model, evaluate=measure)  # federated
optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
for epoch in range(args.epochs):
    for x, y in fed.batches(DataLoader(train, batch_size=20, shuffle=True)):  # federated
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(x).squeeze(1), y)
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {loss.item():.4f}")
fed.save(model, num_examples=len(train), loss=loss.item())  # federated
model.eval()
print(measure(model))
