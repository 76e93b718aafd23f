"""The proof of the kernels and their race, which stand on the whole library; `trust` starts them in a child process.

cases.py      every family's cases, and the bound each must keep
draws.py      the inputs, drawn from the family's seed
sweeps.py     the cases of sweeps; rowwise.py: those of losses without one
zones.py      guard zones around what a kernel writes
child.py      what runs in the child process
race.py       the times of what is proved
"""
