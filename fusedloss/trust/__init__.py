"""Kernels prove themselves on the device where they run, before `auto` uses them.

families.py   what can be right or wrong on its own, and which of it a problem takes
verdicts.py   what was found of them: the key, the file, the lock
ask.py        whether `auto` may take a backend: by the verdicts, or by a child process that finds them
audit.py      rows of a run in fp64, where FUSEDLOSS_AUDIT asks for that
child.py      what runs in that process: the proofs, `cases.py` and what it imports, which stand on the whole library
"""
