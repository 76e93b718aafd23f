"""The losses, a file each or a family, and what one is made of: a `Problem` of its arguments, and a call that runs it.

multiplier, bound = as_scale(scale, x, inverse=False)    a number or a parameter, and the bound if it is a number
operands, places = distinct(x, y)                        a matrix on both sides is one operand
mean_of([Problem(autocast(*operands), ...)], Call())     sweeps, and reduces over the rows
fold_loss(fold_problem(operands, ...), Call())           the same of a loss without a softmax
"""

from ._folded import fold_loss as fold_loss
from ._folded import fold_problem as fold_problem
from ._options import Call as Call
from ._pairs import check_not_negative as check_not_negative
from ._softmax import as_scale as as_scale
from ._softmax import autocast as autocast
from ._softmax import distinct as distinct
from ._softmax import mean_of as mean_of
from ._softmax import over as over
