"""Which AdamW megatron-core builds, whatever it could import."""

from __future__ import annotations

import sys
from types import ModuleType

import megatron.core.optimizer as mcore_optimizer
import pytest
import torch
from megatron.core.optimizer import distrib_optimizer

from megatron_atum.errors import ConfigError
from megatron_atum.parallel import adam
from megatron_atum.parallel.adam import adam_class, check_adam, chosen_adam
from tests.fused_adam import StandInAdam, install_stand_in


@pytest.mark.parametrize("name", ["te", "apex"])
def test_what_is_not_there_is_refused_with_the_fix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, adam._FUSED[name][0], None)  # an import of it fails
    for refused in (adam_class, check_adam):
        with pytest.raises(ConfigError, match=rf"kernels\.adam={name}: .*install.*kernels\.adam=torch would work"):
            refused(name)
    with pytest.raises(ConfigError), chosen_adam(name):
        pytest.fail("went on")


def test_another_package_of_the_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", ModuleType("apex.optimizers"))
    with pytest.raises(ConfigError, match="PyPI's apex is another package"):
        adam_class("apex")


def test_fused_ones_need_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install_stand_in(monkeypatch, "apex")
    monkeypatch.setattr(adam, "has_accelerator", lambda: False)
    with pytest.raises(ConfigError, match=r"kernels\.adam=apex needs a GPU.*kernels\.adam=torch would work"):
        check_adam("apex")
    monkeypatch.setattr(adam, "has_accelerator", lambda: True)
    check_adam("apex")
    check_adam("torch")


def in_use() -> tuple[object, bool, object]:
    return mcore_optimizer.Adam, mcore_optimizer.USING_PYTORCH_OPTIMIZER, distrib_optimizer.Adam


@pytest.mark.parametrize("name", ["te", "apex"])
def test_the_choice_holds_within_the_block_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install_stand_in(monkeypatch, name)
    before = in_use()
    with chosen_adam(name):
        assert in_use() == (StandInAdam, False, StandInAdam)
        with chosen_adam("torch"):
            assert in_use() == (torch.optim.AdamW, True, torch.optim.AdamW)
        assert in_use() == (StandInAdam, False, StandInAdam)
    with pytest.raises(KeyError), chosen_adam(name):
        raise KeyError
    assert in_use() == before


def test_torch_is_chosen_also_where_another_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcore_optimizer, "Adam", StandInAdam)
    monkeypatch.setattr(mcore_optimizer, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(distrib_optimizer, "Adam", StandInAdam)
    with chosen_adam("torch"):
        assert in_use() == (torch.optim.AdamW, True, torch.optim.AdamW)
    assert in_use() == (StandInAdam, False, StandInAdam)
