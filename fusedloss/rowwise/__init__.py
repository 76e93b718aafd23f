"""Losses that need no similarity sweep: one pass over the inputs gives the value and the gradient.

    pointwise.py   elements: a prediction and its target            (regression, binary classification)
    classes.py     rows of logits: one class, or a share of each    (cross-entropy)
    pair_logits.py a linear layer on pairs of embeddings, without their concatenation
    pairs.py       rows of embeddings against one or a few others   (pair and triplet losses, distillation)
    lists.py       rows of scores: which document above which       (rerankers)

Each file holds a formula in ordinary torch (backend "reference"), and a walk over blocks that stay in a CPU's caches
(backend "chunked"; on a GPU one block is everything); `backends/triton_<file>.py` launches the kernels of
`kernels/<file>.py` under the same names.
"""
