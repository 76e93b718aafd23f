"""What all floors agree on: the problem, what primitives are handed, the maths of a row, checks."""
