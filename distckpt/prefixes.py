"""Whose the names in a checkpoint of another library are: under which prefix it has the keys of a module."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from torch import nn

from distckpt.flat_parameters import parameters_of, state_of
from distckpt.wrappers import WRAPPED_NAMES, canonical_keys

# What others save beside a model whose keys have no prefix, as torchtitan does.
BESIDE = frozenset(
    {
        *("optim", "optims", "optimizer", "optimizers", "scheduler", "schedulers", "lr_scheduler", "lr_schedulers"),
        *("dataloader", "data_loader", "train_state", "scaler", "grad_scaler", "rng", "rng_state", "step", "epoch"),
    }
)


@dataclass(frozen=True)
class Assigned:
    """Whose the names are.

    Attributes:
        names: by part, for each key under its prefix, what that is called in the checkpoint. Parts that it has nothing
            of are not there.
        left: what is no module's.
    """

    names: Mapping[str, Mapping[str, str]]
    left: Sequence[str]


def assign(
    names: Collection[str],
    modules: Mapping[str, nn.Module],
    *,
    loose: Collection[str] = (),
    beside: Collection[str] = (),
    renamed: Callable[[str], str] = str,
) -> Assigned:
    """Each module has what is under ``<part>.``; the only one, what is under that, or ``model.``, or no prefix,
    whichever has most of its keys. Where none has any, a prefix that has all of them will do.

    Tied weights are of both names, where the checkpoint has one of them: Hugging Face saves no more.

    Args:
        loose: those of ``names`` that only a module takes that has such a key.
        beside: those first words of names that are no module's, where keys have no prefix.
        renamed: what a key of the checkpoint is called here.

    Raises:
        ValueError: where it does not say for which of several modules it is.
    """
    plain = _plain(names)
    found: dict[str, dict[str, str]] = {}
    for part, module in modules.items():
        tied = _tied(module)
        prefix = _prefix(plain, part, tied, renamed, is_only=len(modules) == 1)
        if prefix is None:
            continue
        mine = {
            name.removeprefix(prefix): called
            for name, called in plain.items()
            if name.startswith(prefix) and (prefix or name.partition(".")[0] not in beside or renamed(name) in tied)
        }
        mine = {key: called for key, called in mine.items() if called not in loose or renamed(key) in tied}
        found[part] = mine | _other_names(tied, {renamed(key): called for key, called in mine.items()})
    if modules and not found:
        raise ValueError(f"does not say for which of {len(modules)} modules it is: {', '.join(modules)}")
    taken = {called for mine in found.values() for called in mine.values()}
    return Assigned(found, [name for name in names if name not in taken])


def _plain(names: Collection[str]) -> dict[str, str]:
    """The names, by what they are without those of wrappers, which nobody gives to a module."""
    plain = {name: name for name in names}
    for name in names:
        short = ".".join(one for one in name.split(".") if one not in WRAPPED_NAMES)
        if short not in plain:
            plain[short] = plain.pop(name)
    return plain


def _prefix(
    plain: Mapping[str, str],
    part: str,
    tied: Mapping[str, Sequence[str]],
    renamed: Callable[[str], str],
    *,
    is_only: bool,
) -> str | None:
    likely = [f"{part}.", "model.", ""] if is_only else [f"{part}."]
    prefixes = [prefix + wrapped for prefix in likely for wrapped in ("", "module.")]
    counts = {
        prefix: sum(name.startswith(prefix) and renamed(name.removeprefix(prefix)) in tied for name in plain)
        for prefix in prefixes
    }
    best = max(prefixes, key=lambda prefix: counts[prefix])  # of several, the first
    if counts[best]:
        return best
    if not is_only:
        return next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in plain)), None)
    return _prefix_of_all(plain, tied, renamed) or ""


def _prefix_of_all(
    plain: Mapping[str, str], tied: Mapping[str, Sequence[str]], renamed: Callable[[str], str]
) -> str | None:
    """The only prefix that has all keys, however long it is."""
    wanted = {key: others[0] for key, others in tied.items()}  # of tied weights one is enough
    under: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for name in plain:
        words = name.split(".")
        for nth in range(1, len(words)):
            if (key := renamed(".".join(words[nth:]))) in wanted:
                under[".".join(words[:nth]) + "."][wanted[key]] += 1
    whole = [prefix for prefix, has in under.items() if len(has) == len(set(wanted.values()))]
    return whole[0] if len(whole) == 1 else None


def _tied(module: nn.Module) -> dict[str, Sequence[str]]:
    """For each key of its state, the keys of the same tensor, itself among them."""
    held = chain(parameters_of(module).items(), module.named_buffers(remove_duplicate=False))
    tensors = {name: id(tensor) for name, tensor in held}
    alike: defaultdict[object, list[str]] = defaultdict(list)
    for key, canonical in canonical_keys(module, state_of(module)).items():
        alike[tensors.get(key, key)].append(canonical)
    return {key: keys for keys in alike.values() for key in keys}


def _other_names(tied: Mapping[str, Sequence[str]], mine: Mapping[str, str]) -> dict[str, str]:
    """Keys that the checkpoint does not have, and what it calls the tensor that they are tied to."""
    found = {}
    for key, others in tied.items():
        if key not in mine and (called := next((mine[one] for one in others if one in mine), None)):
            found[key] = called
    return found
