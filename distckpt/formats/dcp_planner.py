"""Tensors as a planner of ``torch.distributed.checkpoint`` saves them: some left out, others as something else."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.tensor import DTensor

from distckpt.formats.savable import identity
from distckpt.formats.shards import local_of


def check_planner(planner: object) -> None:
    """It can be asked what a rank writes.

    Raises:
        TypeError: where it is none, or one that says what all ranks write.
    """
    if not isinstance(planner, SavePlanner):
        raise TypeError(f"planner should be a SavePlanner of torch.distributed.checkpoint, is {planner!r}")
    if type(planner).create_global_plan is not DefaultSavePlanner.create_global_plan:
        raise TypeError(
            f"planner: {type(planner).__name__} has a create_global_plan of its own. Who writes what of that which "
            "several ranks hold is decided here; create_local_plan, lookup_object and transform_object may be its own"
        )


def planned(planner: SavePlanner, tensors: Mapping[str, Tensor], *, is_leader: bool) -> dict[str, Tensor]:
    """What ``planner`` saves of ``tensors``: by key, of the same shape, and spread over ranks in the same way.

    Raises:
        TypeError: naming a tensor that it makes something else of, or that is not among these.
    """
    planner.set_up_planner(dict(tensors), is_coordinator=is_leader)
    found: dict[str, Tensor] = {}
    for item in planner.create_local_plan().items:
        key, data = item.index.fqn, planner.resolve_data(item)
        tensor = tensors.get(key)
        if tensor is None or not isinstance(data, Tensor) or local_of(data).shape != local_of(tensor).shape:
            told = f"a tensor of {tuple(data.shape)}" if isinstance(data, Tensor) else f"a {type(data).__name__}"
            raise TypeError(f"the planner {type(planner).__name__} makes {told} of {key}: its shape has to stay")
        found[key] = _as(tensor, local_of(data))
    return found


def _as(tensor: Tensor, data: Tensor) -> Tensor:
    """``data`` in the place of what this rank has of ``tensor``."""
    if identity(data) == identity(local_of(tensor)):
        return tensor
    if not isinstance(tensor, DTensor):
        return data
    return DTensor.from_local(
        data, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
