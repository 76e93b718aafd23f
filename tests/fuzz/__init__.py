"""A search for wrong answers: random calls of every loss, held against formulas in fp64.

    python -m tests.fuzz --seconds 3600 --seed 1      an hour; `make fuzz`
    python -m tests.fuzz --function info_nce --cases 500
    python -m tests.fuzz --replay info_nce:417        one case, and everything that is known of it

draw.py      random shapes, strides, dtypes and options
cases.py     what a case is: its tensors, how the function is called, its formula
in_batch.py, labelled.py, pairs.py, lists.py, classes.py      a drawer and a formula for each function
arithmetic.py    what a result may be off by
run.py       a case in all its forms: backends, workspaces, the module, a group of one, permuted, doubled, rows left out
forbidden.py     calls that must raise
known.py     what differs and is left so, which a run reports apart

Formulas are written from the docstrings and the papers in plain torch. None calls the package, so that no error is on
both sides. A case is named by its function and a number, and drawn from these alone: `info_nce:417` is the same call on
every machine for as long as its drawer is not edited.
"""
