"""Pretrained models and tokenizers from a directory in Hugging Face layout; safetensors only, and no hub."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from fedclient.trainer.options import ParameterOptions
from fedclient.trainer.torch_state import TORCH_DTYPES
from fedclient.trainer.without_values import is_active
from fedlink.tensors import DTYPES, TensorError, read_header

EXTRA = "pip install 'fedlink[text]'"
"""What brings the packages that are needed here."""
_INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


class PretrainedError(ValueError):
    """A model directory cannot be used; the text says what it lacks."""


def require(*packages: str, extra: str = EXTRA) -> None:
    """See that packages are there, without importing them.

    Args:
        packages: their names.
        extra: what brings them.

    Raises:
        ImportError: naming the one that is not, and what brings it.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"this workload needs {package}, which {sys.executable} does not have: {extra}")


class Pretrained:
    """A model directory.

    Args:
        directory: with config.json, a tokenizer and the weights in model.safetensors, or in shards and their index.
        trust_remote_code: execute Python files that lie there, if config.json asks for it.

    Raises:
        PretrainedError: it is none.
    """

    def __init__(self, directory: Path, *, trust_remote_code: bool = False) -> None:
        self._directory = directory
        self._trusts = trust_remote_code
        self._trusting = {"trust_remote_code": trust_remote_code, "local_files_only": True}
        if not (directory / "config.json").is_file():
            lacks = "is no directory" if not directory.is_dir() else "has no config.json"
            if (directory / "adapter_config.json").is_file():
                lacks = "holds an adapter; name the directory of the whole model"
            raise PretrainedError(f"model = {str(directory)!r} of site.toml: it {lacks}")
        if (directory / "adapter_config.json").is_file():
            # transformers would load it on top, whatever it holds.
            raise PretrainedError(f"{directory} holds a model and an adapter; move adapter_config.json elsewhere")
        if not (directory / _WEIGHTS).is_file() and not (directory / _INDEX).is_file():
            raise PretrainedError(
                f"{directory} has neither {_WEIGHTS} nor {_INDEX}; other formats are not opened, for they may "
                "execute code: convert them with save_pretrained"
            )

    def tokenizer(self) -> Any:
        """Its tokenizer.

        Raises:
            PretrainedError: it cannot be loaded.
        """
        try:
            return _transformers().AutoTokenizer.from_pretrained(str(self._directory), **self._trusting)
        except (OSError, ValueError, KeyError, ImportError) as e:
            raise PretrainedError(f"{self._directory}: its tokenizer cannot be loaded: {e}") from None

    def config(self, **changes: Any) -> Any:
        """Its configuration, with changes.

        Raises:
            PretrainedError: it cannot be read.
        """
        try:
            found = _transformers().AutoConfig.from_pretrained(str(self._directory), **self._trusting, **changes)
        except (OSError, ValueError, KeyError) as e:
            raise PretrainedError(f"{self._directory}: its config.json cannot be used: {e}") from None
        if getattr(found, "quantization_config", None):
            raise PretrainedError(
                f"{self._directory} holds weights that are quantized already; name the directory of the original, and "
                "let [precision] of site.toml say quantize"
            )
        return found

    def stored_dtype(self) -> torch.dtype | None:
        """What all floating tensors in its files are stored in; None if they differ, or torch does not know it.

        Raises:
            PretrainedError: a file is none of safetensors.
        """
        found = set()
        for path in sorted(self._directory.glob("*.safetensors")):
            try:
                found |= {stored.spec.dtype for stored in read_header(path).tensors}
            except (OSError, TensorError) as e:
                raise PretrainedError(f"{path} cannot be read: {e}") from None
        floating = [name for name in found if DTYPES[name].floating]
        return TORCH_DTYPES.get(floating[0]) if len(floating) == 1 else None

    def model(self, kind: str, config: Any, dtype: torch.dtype | str, *, new_head: bool = False) -> Any:
        """Its weights, in a model of a kind such as "AutoModelForCausalLM".

        The model is laid out without memory, and each tensor is put into it as it is read; or none, where the values
        come from the run's files.

        Args:
            kind: a class of transformers.
            config: what the model is.
            dtype: what weights are held in.
            new_head: whether what is not the body of the model may be missing, or of another size, and is drawn anew.

        Raises:
            PretrainedError: they do not fit.
        """
        transformers = _transformers()
        transformers.utils.logging.disable_progress_bar()
        if is_active():
            held = {} if dtype == "auto" else {"dtype": dtype}
            return getattr(transformers, kind).from_config(config, trust_remote_code=self._trusts, **held)
        try:
            model, report = getattr(transformers, kind).from_pretrained(
                str(self._directory),
                config=config,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=new_head,
                **self._trusting,
            )
        except (OSError, ValueError, KeyError, RuntimeError) as e:
            raise PretrainedError(f"{self._directory}: its weights cannot be loaded: {e}") from None
        for name in sorted({name for name, *_ in report["mismatched_keys"]} | set(report["missing_keys"])):
            # A body may come without its pooler, which only classifiers use.
            is_head = not name.startswith(f"{model.base_model_prefix}.") or ".pooler." in name
            if not (new_head and is_head):
                raise PretrainedError(f"{self._directory}: its weights do not have {name!r} as config.json wants it")
        return model

    def tokenizer_files(self) -> dict[str, bytes]:
        """The files of its tokenizer, by name."""
        paths = [self._directory / name for name in _TOKENIZER]
        return {path.name: path.read_bytes() for path in paths if path.is_file()}


def config_file(config: Any) -> bytes:
    """A configuration as config.json, without where it came from."""
    table = {k: v for k, v in json.loads(config.to_json_string(use_diff=True)).items() if k != "_name_or_path"}
    return json.dumps(table, indent=2, sort_keys=True).encode() + b"\n"


def choose_parameters(model: torch.nn.Module, options: ParameterOptions) -> None:
    """Let those parameters train that the patterns say.

    Raises:
        PretrainedError: a pattern fits none, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in (*options.train, *options.freeze):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise PretrainedError(f"[parameters] of site.toml: {pattern!r} fits no parameter; the first is {names[0]}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_fits(name, options.train) and not _fits(name, options.freeze))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise PretrainedError("[parameters] of site.toml leaves nothing to train")


def usable_length(wanted: int, config: Any, tokenizer: Any) -> int:
    """Tokens of an example at most: what site.toml says, but not more than the model takes."""
    limits = [wanted, int(tokenizer.model_max_length)]
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        # RoBERTa's kind counts positions from behind its padding token.
        offset = 2 if _counts_from_padding(config) else 0
        limits.append(positions - offset)
    return min(limits)


def _counts_from_padding(config: Any) -> bool:
    return getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert", "longformer", "mpnet")


def _fits(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _transformers() -> Any:
    return importlib.import_module("transformers")


def options_of(table: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A table of site.toml, with tuples for lists."""
    found = table.get(key) or {}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
