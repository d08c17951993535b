"""The parts of a program that a Hugging Face ``Accelerator`` prepared."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset

from distckpt.extras import require
from distckpt.loader_position import LoaderPosition

_NO_PARTS = {
    "DEEPSPEED": "the state of DeepSpeed's engine is known to DeepSpeed alone: save it with accelerator.save_state()",
    "MEGATRON_LM": "the state of Megatron-LM is known to it alone: save it with accelerator.save_state()",
    "XLA": "tensors on TPUs cannot be read here: save them with accelerator.save_state()",
}


class Prepared(NamedTuple):
    """What an ``Accelerator`` has prepared.

    Attributes:
        parts: ``model``, ``optimizer``, ``scheduler``, ``loader``, ``custom``, each further one with its number
            (``model_1``), and ``scaler``: as `distckpt.state.Parts` takes them.
        own: those that each rank has of its own.
    """

    parts: dict[str, Any]
    own: set[str]


def is_accelerator(state: Any) -> bool:
    """Whether it is an ``Accelerator``. Does not import it."""
    known = sys.modules.get("accelerate")
    return known is not None and isinstance(state, known.Accelerator)


def prepared_by(accelerator: Any) -> Prepared:
    """Everything that ``prepare()`` and ``register_for_checkpointing()`` of ``accelerator`` have seen.

    Raises:
        ImportError: where Accelerate is of a version that was not tested.
        ValueError: where nothing was prepared yet.
        TypeError: where it trains with what keeps its state to itself (DeepSpeed, Megatron-LM, TPUs).
    """
    refuse_unknown_state(accelerator)
    if not accelerator._models:
        raise ValueError("this Accelerator has no model yet: call accelerator.prepare() before")
    loaders = _numbered("loader", [PreparedLoader(one, accelerator) for one in accelerator._dataloaders])
    parts = {
        **_numbered("model", accelerator._models),
        **_numbered("optimizer", [one.optimizer for one in accelerator._optimizers]),
        **_numbered("scheduler", accelerator._schedulers),
        **({"scaler": accelerator.scaler} if accelerator.scaler is not None else {}),
        **loaders,
        **_numbered("custom", accelerator._custom_objects),
    }
    return Prepared(parts, set(loaders))


def refuse_unknown_state(accelerator: Any) -> None:
    """All that it will prepare can be saved.

    Raises:
        ImportError, TypeError: as in `prepared_by`.
    """
    require("accelerate", extra="accelerate", at_least="1.15")
    if (why := _NO_PARTS.get(accelerator.distributed_type.name)) is not None:
        raise TypeError(f"this Accelerator cannot be saved, for {why}")


class PreparedLoader:
    """How far a prepared loader is. It counts its epochs, and has fetched one batch more than training has seen.

    Args:
        is_left: whether what is left of the epoch will not be asked for.
    """

    def __init__(self, loader: Any, accelerator: Any, *, is_left: Callable[[], bool] = lambda: False) -> None:
        self._loader = loader
        self._is_left = is_left
        # Where one process reads for all, it fetches a batch for each; but where all ranks see the same one.
        is_read_for_all = hasattr(loader, "_fetch_batches") and not loader.split_batches and not loader.submesh_tp
        self._fetched_at_once = accelerator.num_processes if is_read_for_all else 1
        # What knows where it is itself is asked; else the random numbers that an order is drawn from matter, too.
        base = loader.base_dataloader
        is_stateful = hasattr(base, "state_dict") and (
            isinstance(base.dataset, IterableDataset) or hasattr(base.dataset, "state_dict")
        )
        self._position = LoaderPosition(
            base,
            ahead=self._ahead,
            epoch=lambda: int(loader.iteration),
            inner=loader if is_stateful else None,
        )

    def state_dict(self) -> dict[str, Any]:
        sampler = self._loader.get_sampler() if hasattr(self._loader, "get_sampler") else None
        return {**self._position.state_dict(), "seed": getattr(sampler, "initial_seed", None)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._loader.iteration = state["epoch"]
        if state["seed"] is not None:  # the order is drawn from that and the epoch's number
            self._loader.get_sampler().initial_seed = state["seed"]
        self._position.load_state_dict(state)

    def skip(self, batches: int, *, epoch: int) -> None:
        """As `load_state_dict`, where nothing is known but how many batches of an epoch every rank has seen."""
        self._loader.set_epoch(epoch)
        self._position.skip(batches * self._fetched_at_once)

    def _ahead(self) -> int | None:
        """How many batches were fetched last, of which training has seen none: of the last in an epoch there may be
        fewer. ``None`` where it has seen all."""
        running = self._position.running
        if self._loader.end_of_dataloader or self._is_left() or running is None:
            return None
        return (running.count - 1) % self._fetched_at_once + 1


def _numbered(name: str, objects: list[Any]) -> dict[str, Any]:
    return {f"{name}_{nth}" if nth else name: one for nth, one in enumerate(objects)}
