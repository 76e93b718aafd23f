"""Drop-ins for sentence_transformers, open_clip, pytorch_metric_learning, lightly, FlagEmbedding, colpali_engine,
tevatron, nemo_automodel, swift, transformers and torch.

    from fusedloss.integrations import sentence_transformers as fused

    fused.patch()                                        # every class, wherever it is already imported; one line
    loss = fused.MultipleNegativesRankingLoss(model)     # or one by one

Each submodule has subclasses of the library's classes with the same names, constructors, attributes and configuration;
only the score stage is replaced. If a call cannot be fused (a similarity of your own, sparse tensors, an overridden
method), the library's code runs, and the logger "fusedloss" warns once. On a CPU it also runs for so few similarities
that it is the faster: `LIBRARY_UP_TO` has their number for each class. `FUSEDLOSS_DISABLE=1` turns all of it off.
`calls` counts the calls that ran fused.
"""

from ._drop_in import LIBRARY_UP_TO as LIBRARY_UP_TO
from ._drop_in import Patch as Patch
from ._drop_in import calls as calls
