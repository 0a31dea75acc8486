"""A script with the Trainer of transformers: short texts into two kinds. By hand: `python hf_trainer.py`.

A federation adds the four lines that are marked; by hand they do nothing.
"""

import sys

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from fedclient import trainer as fed  # federated


class Notes(Dataset[dict[str, torch.Tensor]]):
    """Stands for a clinic's own notes: twelve words each, and which of two kinds it is."""

    def __init__(self, clinic: int, count: int) -> None:
        generator = torch.Generator().manual_seed(clinic)
        self.words = torch.randint(0, 50, (count, 12), generator=generator)
        self.kinds = (self.words < 20).sum(1) // 5 % 2

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.words[number], "labels": self.kinds[number]}


train = Notes(clinic=int(sys.argv[1]) if len(sys.argv) > 1 else 1, count=48)
model = BertForSequenceClassification(
    BertConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
)
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir="notes",
        num_train_epochs=2,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        logging_steps=4,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=train,
)
fed.load(model)  # federated
fed.watch(trainer)  # federated
result = trainer.train()
fed.save(model, num_examples=len(train), loss=result.training_loss)  # federated
trainer.save_model("notes/model")
