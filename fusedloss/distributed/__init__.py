"""Losses over the batches of all processes: `group=`, `strategy=` and `grad_scale=` of the in-batch losses.

    loss = fusedloss.info_nce(query, key, group="world")

"world" means all ranks. Before init_process_group it raises, whereas dist.group.WORLD is then None, which means this
process alone. The columns of all ranks are gathered, each rank computes its own rows against them, and the gradients by
the columns are summed on the rank that owns them: one collective of embeddings each way; logits are never sent. Every
rank gets the mean over all rows. With strategy="ring" a rank holds one shard of the columns at a time (`ring`).

All ranks must make the same call; only the number of rows may differ. Ranks first exchange a description of the call in
one small collective. If one rank's arguments are wrong, or the calls differ, every rank raises at once. Options,
dtypes, dimensions and Python numbers are compared, and learnable parameters by value if they are on a CPU (to 1e-6; a
GPU's are read back only under FUSEDLOSS_CHECK=1). `weight`, `workspace_bytes` and `backend` may differ: a rank without
weights weighs its rows 1. A rank with an empty batch passes an empty tensor that is still attached to its encoder, e.g.
`encoder(padded)[:0]`.

That collective runs on the CPU if the group has a backend for it, as after init_process_group() or
init_process_group("cpu:gloo,cuda:nccl"); then nothing waits for a GPU. After init_process_group("nccl") it runs on the
GPU and the host reads its result, once a call: ranks could not know each other's numbers of rows otherwise.

Gradients are those of one process with the whole batch: `grad_scale="sum"` gives each rank its share, whose sum over
ranks is the gradient of every parameter; `"ddp"` gives world-size times that, because DistributedDataParallel and FSDP
average. Both hold for encoders, and for learnable temperatures, scales and biases as well. `"match:<library>"` scales
as that library does, right or wrong: `MATCH`.

info_nce's `bank` stays on its rank: rows see the rank's own, such as a queue that all ranks hold alike. With
bank_across=True the banks of all ranks compete. `negatives`, which their own row alone sees, never travel.

Refused with a group, on all ranks: label_smoothing, return_stats, bool masks (the others work), info_nce's `negatives`
beside a target, siglip's int64 targets, second derivatives; with strategy="ring" also backend="reference", sup_con's
form="in", and explicit targets together with a margin or a guide. docs/support.md has the table.
"""

from .agreement import Agreed as Agreed
from .agreement import Part as Part
from .agreement import Request as Request
from .agreement import agree as agree
from .agreement import alike as alike
from .agreement import refuse as refuse
from .gather import averaged as averaged
from .gather import everywhere as everywhere
from .gather import loss_across as loss_across
from .gather import part_across as part_across
from .gather import scaled as scaled
from .gather import summed_across as summed_across
from .world import GRAD_SCALES as GRAD_SCALES
from .world import MATCH as MATCH
from .world import STRATEGIES as STRATEGIES
from .world import World as World
from .world import check_group as check_group
from .world import world_of as world_of
