"""Losses over the batches of all processes: `group=`, `strategy=` and `grad_scale=` of the in-batch losses.

    loss = fusedloss.info_nce(query, key, group="world")

"world" are all ranks, once init_process_group has been called; before that it raises, where dist.group.WORLD is None
and asks for the loss of this process alone. The columns of all ranks are gathered, each rank computes its own rows
against them, and the gradients by the columns go back to whose they are, summed: one collective each way, of
embeddings; logits never travel. Every rank gets the mean over all rows. With strategy="ring" a rank holds one shard of
the columns at a time (`ring`).

Every rank makes the same call. Before anything travels, ranks tell each other in one small collective what they are
about to do: where one refuses its arguments, or they differ in more than numbers of rows, all of them raise at once.
Options, dtypes, dimensions and Python numbers are compared, and learnable parameters by value where they are on a CPU
(to 1e-6; a GPU's are not read back, but under FUSEDLOSS_CHECK=1). `weight`, `workspace_bytes` and `backend` are a
rank's own: one without weights weighs its rows 1. A rank without rows passes what its encoder gives for none; where
the encoder takes no empty batch, one row, cut off again: `encoder(padded)[:0]`.

That collective runs on the CPU where the group has a backend for it, as after init_process_group() or
init_process_group("cpu:gloo,cuda:nccl"); then nothing waits for a GPU. After init_process_group("nccl") it runs on the
GPU and the host reads its result, once a call: ranks could not know each other's numbers of rows otherwise.

Gradients are those of one process with the whole batch: `grad_scale="sum"` gives each rank its share, whose sum over
ranks is the gradient of every parameter; `"ddp"` gives world-size times that, because DistributedDataParallel and FSDP
average. Both hold for encoders, and for learnable temperatures, scales and biases as well. `"match:<library>"` scales
as that library does, right or wrong: `MATCH`.

Refused with a group, on all ranks: label_smoothing, return_stats, bool masks (the others work), info_nce's `negatives`
and `bank`, siglip's int64 targets, second derivatives; with strategy="ring" also backend="reference", sup_con's
form="in", and explicit targets together with a margin or a guide. docs/support.md has the table.
"""

from .agreement import Part as Part
from .agreement import Request as Request
from .agreement import agree as agree
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
