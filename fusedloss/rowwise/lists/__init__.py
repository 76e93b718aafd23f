"""Losses of lists: the scores of a query's documents `[Q, n]`, and labels that say how relevant each is.

    pairwise   RankNet, LambdaLoss, ADR-MSE: n^2 pairs a query, visited in blocks, none of them kept
    listwise   ListNet, ListMLE, PListMLE: one pass over each row

The pairwise losses sort the documents by score first. With i ranked above j, `s_j - s_i` is never positive:
exponentials cannot overflow, every pair is visited once, and its gradient by document j is minus that by document i, so
a block's gradient is its row sums minus its column sums. Every function computes its gradient with its value. Only that
gradient is saved for backward, in fp32, so that no pair's share underflows in 16 bits before upstream enlarges it.
"""

from .adr_mse import adr_mse as adr_mse
from .common import BLOCK as BLOCK
from .common import PADDING as PADDING
from .lambda_loss import LN2 as LN2
from .lambda_loss import lambda_gradients as lambda_gradients
from .lambda_loss import lambda_loss as lambda_loss
from .listwise import list_mle as list_mle
from .listwise import list_net as list_net
from .soft_pairs import soft_pairs as soft_pairs
from .walk import ONE_BLOCK as ONE_BLOCK
