"""A script with TRL's SFTTrainer: a language model learns a site's texts by LoRA. `python sft.py MODEL TEXTS.jsonl`.

A federation adds the four lines that are marked; by hand they do nothing. Only the adapter travels.
"""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from fedclient import trainer as fed  # federated

base, texts = sys.argv[1:]
train = load_dataset("json", data_files=texts, split="train")
trainer = SFTTrainer(
    model=base,
    args=SFTConfig(
        output_dir="tuned",
        max_steps=6,
        bf16=torch.cuda.is_available(),
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        max_length=64,
        logging_steps=2,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=train,
    peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
)
fed.load(trainer.model)  # federated
fed.watch(trainer)  # federated
result = trainer.train()
fed.save(trainer.model, num_examples=len(train), loss=result.training_loss)  # federated
trainer.save_model("tuned/adapter")
