"""Drop-ins for sentence_transformers, open_clip, pytorch_metric_learning and lightly.

    from fusedloss.integrations import sentence_transformers as fused

    fused.patch()                                        # every class, wherever it is already imported; one line
    loss = fused.MultipleNegativesRankingLoss(model)     # or one by one

Each submodule has classes of the library's names that subclass the library's: same constructors, attributes and
configuration, of which only the score stage is ours. Where a call cannot be fused (a similarity of your own, sparse
tensors, an overridden method) the library's own code runs, and a warning of the logger "fusedloss" says so once.
`FUSEDLOSS_DISABLE=1` turns all of it off. `calls` counts what ran fused.
"""

from ._drop_in import Patch as Patch
from ._drop_in import calls as calls
