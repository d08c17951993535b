"""Parameters that no module has: nothing says whether those of two ranks are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sharded_programs import Holder, running
from torch import nn

import distckpt
from distckpt import RankFailure


def trained(rank: int) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    """Each rank has another parameter, of the same shape."""
    loose = nn.Parameter(torch.full((3,), float(rank)))
    optimizer = torch.optim.Adam([loose], lr=0.5)
    loose.grad = torch.full((3,), rank + 1.0)
    optimizer.step()
    return loose, optimizer


def moments(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [one["exp_avg"].tolist() for one in optimizer.state_dict()["state"].values()]


def refuse(rank: int, out: str) -> str:
    with pytest.raises(RankFailure) as raised:
        distckpt.Checkpointer(out, {"optim": trained(rank)[1]}, format="sharded")
    return str(raised.value)


def test_parameters_of_no_module_are_refused_on_several_ranks_before_training(run_ranks, tmp_path):
    out = tmp_path / "run"
    for told in run_ranks(2, refuse, str(out)):
        assert "rank 0: TypeError: state['optim'] has parameters that are in no module of state (1 of 1" in told
        assert "rank 1" in told
    assert not out.exists()


class Named(torch.optim.Adam):
    """It tells of its state in a way of its own, by numbers or by names."""

    is_by_name = False

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return {"state.mine.exp_avg": state["state"][0]["exp_avg"]} if self.is_by_name else state


def save_own_form(rank: int, out: str, is_by_name: bool) -> str:
    loose, _ = trained(rank)
    optimizer = Named([loose])
    optimizer.is_by_name = is_by_name
    optimizer.step()
    with running(out, {"optim": optimizer}) as ckpt:
        ckpt.step()
        try:
            ckpt.save(wait=True)
        except RankFailure as failure:
            return str(failure)
    return ""


def test_an_optimizer_that_numbers_in_a_way_of_its_own_is_refused_when_it_is_saved(run_ranks, tmp_path):
    for told in run_ranks(2, save_own_form, str(tmp_path / "run"), False):
        assert "state['optim'] has parameters that are in no module of state" in told
    assert run_ranks(2, save_own_form, str(tmp_path / "other"), True) == ["", ""]


def save_more(rank: int, out: str) -> str:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    with running(out, {"model": model, "optim": optimizer}) as ckpt:
        ckpt.step()
        ckpt.save(wait=True)
        if rank == 1:
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
        ckpt.step()
        with pytest.raises(RankFailure) as raised:
            ckpt.save(wait=True)
    return str(raised.value)


def test_one_that_is_added_later_on_one_rank_fails_the_save_on_all(run_ranks, tmp_path):
    for told in run_ranks(2, save_more, str(tmp_path / "run")):
        assert "rank 1: TypeError: state['optim'] has" in told and "(1 of 3, the first is number 2)" in told


def with_names(rank: int, words: dict[str, Any], is_named: bool) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
    loose, optimizer = trained(rank)
    named = {"loose": nn.ParameterList([loose])} if is_named else {"loose": Holder({})}
    return optimizer, {"optim": optimizer, **named}


def save_allowed(rank: int, out: str, words: dict[str, Any], is_named: bool) -> list[Any]:
    optimizer, state = with_names(rank if "per_rank" in words else 1, words, is_named)
    with running(out, state, **words) as ckpt:
        ckpt.step()
        ckpt.save(wait=True)
    return moments(optimizer)


def restore_allowed(rank: int, out: str, words: dict[str, Any], is_named: bool) -> list[Any]:
    optimizer, state = with_names(7, words, is_named)
    with running(out, state, **words) as ckpt:
        assert ckpt.resume() == 1
    return moments(optimizer)


@pytest.mark.parametrize(
    ("words", "is_named"), [({"per_rank": ["optim"]}, False), ({"format": "full"}, False), ({}, True)]
)
def test_each_way_out_that_the_refusal_names_brings_every_rank_its_moments_back(run_ranks, tmp_path, words, is_named):
    out = str(tmp_path / "run")
    saved = run_ranks(2, save_allowed, out, words, is_named)
    assert run_ranks(2, restore_allowed, out, words, is_named) == saved
    assert (saved[0] != saved[1]) == ("per_rank" in words)


def test_one_process_numbers_them_as_it_always_did(run_ranks, tmp_path):
    out = str(tmp_path / "run")
    assert run_ranks(1, save_allowed, out, {}, False) == run_ranks(1, restore_allowed, out, {}, False)
