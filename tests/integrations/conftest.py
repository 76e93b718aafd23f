import pytest

from fusedloss.integrations import LIBRARY_UP_TO


@pytest.fixture(autouse=True)
def ours_at_every_size():
    """The tests here are of the fused code, in batches for which the library's would run; test_drop_in_small.py is not.

    Emptied, not replaced: that is what users are told to do.
    """
    before = dict(LIBRARY_UP_TO)
    LIBRARY_UP_TO.clear()
    yield before
    LIBRARY_UP_TO.clear()
    LIBRARY_UP_TO.update(before)
