"""Saved models: safetensors files, which hold tensors and strings and never code."""

from pathlib import Path

import safetensors
import safetensors.torch
from torch import nn

from cnn_ext.mnist import model as model_module
from cnn_ext.mnist.errors import InputError, reason

FILE_NAME = "checkpoint"


def to_bytes(model: nn.Module, dataset: str, epoch: int) -> bytes:
    """The weights, and beside them what they are the weights of."""
    metadata = {"model": model_module.NAME, "dataset": dataset, "epoch": str(epoch)}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    return safetensors.torch.save(weights, metadata)


def load(path: Path, model: nn.Module) -> str:
    """Copies the weights in ``path`` into ``model`` and returns the name of the data set that they were trained on.

    Nothing is copied before every name, shape and type is found to be the model's.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            _check(path, file, model)
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a dict)
            return file.metadata()["dataset"]
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a checkpoint: {reason(error)}") from error


def _check(path: Path, file, model: nn.Module) -> None:
    metadata = file.metadata() or {}
    found = metadata.get("model", "a model without a name")
    if found != model_module.NAME:
        raise InputError(f"{path}: a checkpoint of another model: it holds {found}, not {model_module.NAME}")
    if metadata.get("dataset") not in ("mnist", "digits"):
        raise InputError(f"{path}: a damaged checkpoint: it does not say what it was trained on")
    wanted = {name: (list(tensor.shape), "F32") for name, tensor in model.state_dict().items()}
    held = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    for name in sorted(wanted.keys() | held.keys()):
        got = (held[name].get_shape(), held[name].get_dtype()) if name in held else None
        if got != wanted.get(name):
            raise InputError(f"{path}: a checkpoint of another model: {name} is {got}, not {wanted.get(name)}")
