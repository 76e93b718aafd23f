"""What the drop-ins share: the patch rebinds and reverts everywhere, decisions are counted or told once."""

from __future__ import annotations

import copy
import logging
import pickle
import sys
from types import ModuleType

import pytest

from fusedloss.integrations import Patch, _drop_in, calls


@pytest.fixture
def library(monkeypatch):
    """A library with a class and a function, and a script that has imported both."""
    module, script = ModuleType("a_library"), ModuleType("a_script")
    exec("class Loss: pass\ndef mine(): return 'theirs'", module.__dict__)
    script.Loss, script.mine, script.other = module.Loss, module.mine, 1
    for m in (module, script):
        monkeypatch.setitem(sys.modules, m.__name__, m)
    return module, script


def ours_of(module):
    class Loss(module.Loss):
        pass

    Loss.__qualname__ = "Loss"
    return Loss, lambda: "ours"


def test_a_patch_rebinds_where_it_is_imported_and_reverts(library):
    module, script = library
    (Loss, mine), originals = ours_of(module), (module.Loss, module.mine)
    patch = Patch({module.Loss: Loss, module.mine: mine})
    assert (module.Loss, module.mine) == (script.Loss, script.mine) == (Loss, mine)
    assert Loss.__module__ == "a_library" and script.other == 1
    assert type(pickle.loads(pickle.dumps(script.Loss()))) is Loss
    for _ in range(2):
        patch.undo()
        assert (module.Loss, module.mine) == (script.Loss, script.mine) == originals
        assert Loss.__module__ == __name__


def test_as_a_context_and_nested(library):
    module, script = library
    (Loss, _), original = ours_of(module), module.Loss
    with Patch({original: Loss}):
        with Patch({original: Loss}):
            assert script.Loss is Loss
        assert script.Loss is Loss and Loss.__module__ == "a_library"
        with pytest.raises(KeyError), Patch({original: Loss}):
            raise KeyError
        assert script.Loss is Loss
    assert script.Loss is module.Loss is original and Loss.__module__ == __name__


def test_undone_in_the_order_they_were_made(library):
    module, script = library
    (Loss, _), original = ours_of(module), module.Loss
    patches = [Patch({original: Loss}) for _ in range(2)]
    for patch in patches:
        assert script.Loss is module.Loss is Loss and Loss.__module__ == "a_library"
        patch.undo()
    assert script.Loss is module.Loss is original and Loss.__module__ == __name__


def test_modules_imported_meanwhile_are_reverted_and_a_chosen_drop_in_stays(library, monkeypatch):
    module, script = library
    (Loss, _), original = ours_of(module), module.Loss
    script.chosen = Loss
    later = ModuleType("later")
    with Patch({original: Loss}):
        later.Loss = module.Loss  # from a_library import Loss
        monkeypatch.setitem(sys.modules, "later", later)
    assert later.Loss is original and script.chosen is Loss


def test_the_environment_turns_it_off(library, monkeypatch, caplog):
    module, script = library
    (Loss, _), original = ours_of(module), module.Loss
    monkeypatch.setenv("FUSEDLOSS_DISABLE", "1")
    with Patch({original: Loss}):
        assert script.Loss is module.Loss is original
    before = calls["a_library.Loss"]
    assert not _drop_in.runs_fused("a_library.Loss", None)
    monkeypatch.setenv("FUSEDLOSS_DISABLE", "0")
    assert _drop_in.runs_fused("a_library.Loss", None)
    assert calls["a_library.Loss"] == before + 1 and not caplog.records


def test_a_reason_is_told_once(caplog):
    with caplog.at_level(logging.WARNING, logger="fusedloss"):
        for reason in ("the moon is full", "the moon is full", "it rains"):
            assert not _drop_in.runs_fused("a_library.Told", reason)
    assert [record.getMessage() for record in caplog.records] == [
        "a_library.Told runs the library's own code, because the moon is full",
        "a_library.Told runs the library's own code, because it rains",
    ]
    assert calls["a_library.Told"] == 0


def test_a_missing_library_is_named_with_what_to_install():
    with pytest.raises(ImportError, match=r"needs no-such, tested with 1.2: pip install 'no-such==1.2'"):
        _drop_in.library("no_such_library", "no-such", "1.2")
    with pytest.raises(ImportError, match=r"needs no-such 1.0 or newer, tested with 1.2: pip install 'no-such==1.2'"):
        _drop_in.library("no_such_library", "no-such", "1.2", least="1.0")


def test_what_raises_is_not_counted():
    @_drop_in.counted
    def call(name, fails=False, inner=None):
        assert _drop_in.runs_fused(name, None)
        if inner:
            inner()
        if fails:
            raise ValueError("labels")

    before = calls.copy()
    call("a_library.Counted")
    with pytest.raises(ValueError, match="labels"):
        call("a_library.Counted", fails=True)
    assert calls - before == {"a_library.Counted": 1}
    call("a_library.Outer", inner=lambda: call("a_library.Inner"))
    assert calls - before == {"a_library.Counted": 1, "a_library.Outer": 1, "a_library.Inner": 1}


def test_an_object_made_beforehand_is_pickled(library):
    """By its class's name, which leads to ours while the patch stands."""
    module, _ = library
    (Loss, _), original = ours_of(module), module.Loss
    made = original()
    made.scale = 3.0
    with Patch({original: Loss}), Patch({original: Loss}):
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            data = pickle.dumps(made, protocol)
            assert type(pickle.loads(data)) is Loss
        assert type(copy.deepcopy(made)) is Loss and copy.copy(made).scale == 3.0
    back = pickle.loads(data)
    assert type(back) is type(copy.copy(made)) is original and back.scale == 3.0
