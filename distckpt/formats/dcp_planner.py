"""Tensors as a planner of ``torch.distributed.checkpoint`` saves them: some left out, others as something else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.tensor import DTensor

from distckpt.formats.savable import identity
from distckpt.formats.shards import local_of
from distckpt.formats.spread import Spread

_Place = tuple[int, ...] | None


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
    found: defaultdict[str, dict[_Place, Tensor]] = defaultdict(dict)
    for item in planner.create_local_plan().items:
        key, data = item.index.fqn, planner.resolve_data(item)
        views = _views_in(tensors[key]) if key in tensors else {}
        place = tuple(item.index.offset or ()) if len(views) > 1 else next(iter(views), None)
        if place not in views or not isinstance(data, Tensor) or local_of(data).shape != views[place].shape:
            told = f"a tensor of {tuple(data.shape)}" if isinstance(data, Tensor) else f"a {type(data).__name__}"
            raise TypeError(f"the planner {type(planner).__name__} makes {told} of {key}: its shape has to stay")
        found[key][place] = local_of(data)
    return {key: _as(key, tensors[key], views) for key, views in found.items()}


def _views_in(tensor: Tensor) -> dict[_Place, Tensor]:
    """The tensors in which all of ``tensor`` lies that is here, by where each begins in the whole."""
    if isinstance(tensor, Spread):
        return {box.offsets: view for box, view in zip(tensor.boxes, tensor.views, strict=True)}
    return {None: local_of(tensor)}


def _as(key: str, tensor: Tensor, views: Mapping[_Place, Tensor]) -> Tensor:
    """``views`` in the place of what this rank has of ``tensor``."""
    mine = _views_in(tensor)
    if len(views) != len(mine):
        raise TypeError(f"the planner leaves a part of {key} out: all of it, or nothing, can be left out")
    if all(identity(views[place]) == identity(view) for place, view in mine.items()):
        return tensor
    if isinstance(tensor, Spread):
        return tensor.with_views([views[place] for place in mine])
    (data,) = views.values()
    if not isinstance(tensor, DTensor):
        return data
    return DTensor.from_local(
        data, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
