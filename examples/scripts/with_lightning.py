"""A script with Lightning: how long a machine will still run. By hand: `python with_lightning.py`.

A federation adds the four lines that are marked; by hand they do nothing.
"""

import sys

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedclient import trainer as fed  # federated


def machines(plant: int, count: int) -> TensorDataset:
    """Stands for a plant's own records: eight sensors, and the hours that were left."""
    generator = torch.Generator().manual_seed(plant)
    sensors = torch.randn(count, 8, generator=generator)
    hours = sensors @ torch.linspace(-1, 1, 8) + 0.1 * torch.randn(count, generator=generator)
    return TensorDataset(sensors, hours)


class Hours(lightning.LightningModule):
    """The model, and how it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 1))

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        """The loss of a batch."""
        x, y = batch
        loss = nn.functional.mse_loss(self.layers(x).squeeze(1), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-2)


train = machines(plant=int(sys.argv[1]) if len(sys.argv) > 1 else 1, count=64)
model = Hours()
trainer = lightning.Trainer(
    max_epochs=2,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    log_every_n_steps=1,
)
fed.load(model)  # federated
fed.watch(trainer)  # federated
trainer.fit(model, DataLoader(train, batch_size=16, shuffle=True))
fed.save(model, num_examples=len(train))  # federated
torch.save(model.state_dict(), "hours.pt")
