"""Kernels are proved on the device where they run, before `auto` uses them.

families.py   what can be right or wrong on its own, and which of it a problem takes
verdicts.py   what was found of them: the key, the file, the lock
order.py      which backend is tried first: by the races that were run
ask.py        whether `auto` may take a backend: by the verdicts, or by a child process that finds them (`proof/`)
"""
