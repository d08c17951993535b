"""safetensors save_file of all tensors, fsynced; load_file."""

from __future__ import annotations

import json
from pathlib import Path

from files import fsync
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from contenders import Contender


class Safetensors(Contender):
    package, is_durable = "safetensors", True

    def save(self, step: int) -> None:
        tensors = {f"model.{key}": tensor for key, tensor in self.model.state_dict().items()}
        state = self.optimizer.state_dict()
        for index, of in state["state"].items():
            tensors |= {f"optimizer.{index}.{key}": tensor for key, tensor in of.items() if tensor is not None}
        save_file(tensors, self.path(step), {"param_groups": json.dumps(state["param_groups"])})
        fsync(self.path(step))
        fsync(self.directory)

    def restore(self, step: int) -> None:
        with safe_open(self.path(step), "pt") as file:
            groups = json.loads(file.metadata()["param_groups"])
        model, state = {}, {}
        for name, tensor in load_file(self.path(step)).items():
            part, _, key = name.partition(".")
            if part == "model":
                model[key] = tensor
            else:
                index, _, key = key.partition(".")
                state.setdefault(int(index), {})[key] = tensor
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def path(self, step: int) -> Path:
        return self.directory / f"{step}.safetensors"


contender: Contender = Safetensors()
