"""sentence-transformers' losses, with fused score stages: swap an import, or `patch()` a script as it is.

    from fusedloss.integrations import sentence_transformers as losses

    loss = losses.MultipleNegativesRankingLoss(model)    # everything else of the library stays
    trainer = SentenceTransformerTrainer(model=model, train_dataset=dataset, loss=loss)

Constructors, attributes, configuration and citation are the library's; embedding, gradient caching and the checks of
columns and labels run its code. Results are float32 scalars (float64 for float64 embeddings); the library's have the
embeddings' dtype. Losses of sparse encoders are in `.sparse_encoder`, of cross-encoders in `.cross_encoder`, MaxSim
losses in `.multi_vector_encoder`. `SupConLoss` and `SigLIPLoss`, which the library lacks, are here too. Tested with
6.2.0; 6.0 or newer is needed.
"""

from __future__ import annotations

import importlib
from typing import Any

from .._drop_in import Patch, library

# A module that 6.x has and earlier versions lack.
library("sentence_transformers.base.losses.merged_forward", "sentence-transformers", "6.2.0", least="6.0")

from sentence_transformers.sentence_transformer.losses import (  # noqa: E402
    BatchHardTripletLossDistanceFunction as BatchHardTripletLossDistanceFunction,
)
from sentence_transformers.sentence_transformer.losses import (  # noqa: E402
    ContrastiveTensionDataLoader as ContrastiveTensionDataLoader,
)
from sentence_transformers.sentence_transformer.losses import (  # noqa: E402
    SiameseDistanceMetric as SiameseDistanceMetric,
)
from sentence_transformers.sentence_transformer.losses import (  # noqa: E402
    TripletDistanceMetric as TripletDistanceMetric,
)

from ._added import SigLIPLoss as SigLIPLoss  # noqa: E402
from ._added import SupConLoss as SupConLoss  # noqa: E402
from ._cached import CachedGISTEmbedLoss as CachedGISTEmbedLoss  # noqa: E402
from ._cached import CachedMultipleNegativesRankingLoss as CachedMultipleNegativesRankingLoss  # noqa: E402
from ._cached import (  # noqa: E402
    CachedMultipleNegativesSymmetricRankingLoss as CachedMultipleNegativesSymmetricRankingLoss,
)
from ._denoising import DenoisingAutoEncoderLoss as DenoisingAutoEncoderLoss  # noqa: E402
from ._mined import BatchAllTripletLoss as BatchAllTripletLoss  # noqa: E402
from ._mined import BatchHardSoftMarginTripletLoss as BatchHardSoftMarginTripletLoss  # noqa: E402
from ._mined import BatchHardTripletLoss as BatchHardTripletLoss  # noqa: E402
from ._mined import BatchSemiHardTripletLoss as BatchSemiHardTripletLoss  # noqa: E402
from ._modifiers import AdaptiveLayerLoss as AdaptiveLayerLoss  # noqa: E402
from ._modifiers import Matryoshka2dLoss as Matryoshka2dLoss  # noqa: E402
from ._modifiers import MatryoshkaLoss as MatryoshkaLoss  # noqa: E402
from ._pairs import AnglELoss as AnglELoss  # noqa: E402
from ._pairs import ContrastiveLoss as ContrastiveLoss  # noqa: E402
from ._pairs import ContrastiveTensionLoss as ContrastiveTensionLoss  # noqa: E402
from ._pairs import CoSENTLoss as CoSENTLoss  # noqa: E402
from ._pairs import CosineSimilarityLoss as CosineSimilarityLoss  # noqa: E402
from ._pairs import DistillKLDivLoss as DistillKLDivLoss  # noqa: E402
from ._pairs import EmbedDistillLoss as EmbedDistillLoss  # noqa: E402
from ._pairs import GlobalOrthogonalRegularizationLoss as GlobalOrthogonalRegularizationLoss  # noqa: E402
from ._pairs import MarginMSELoss as MarginMSELoss  # noqa: E402
from ._pairs import MSELoss as MSELoss  # noqa: E402
from ._pairs import OnlineContrastiveLoss as OnlineContrastiveLoss  # noqa: E402
from ._pairs import SoftmaxLoss as SoftmaxLoss  # noqa: E402
from ._pairs import TripletLoss as TripletLoss  # noqa: E402
from ._ranking import ContrastiveTensionLossInBatchNegatives as ContrastiveTensionLossInBatchNegatives  # noqa: E402
from ._ranking import GISTEmbedLoss as GISTEmbedLoss  # noqa: E402
from ._ranking import MegaBatchMarginLoss as MegaBatchMarginLoss  # noqa: E402
from ._ranking import MultipleNegativesRankingLoss as MultipleNegativesRankingLoss  # noqa: E402
from ._ranking import MultipleNegativesSymmetricRankingLoss as MultipleNegativesSymmetricRankingLoss  # noqa: E402
from .mining import library_mine_hard_negatives  # noqa: E402
from .mining import mine_hard_negatives as mine_hard_negatives  # noqa: E402


def drop_ins(module: Any) -> dict[type, type]:
    """Maps the library's classes to ours: those in `module` that derive from one of the same name."""
    found = {}
    for own in vars(module).values():
        if isinstance(own, type):
            theirs = [base for base in own.__mro__[1:] if base.__name__ == own.__name__]
            found.update({base: own for base in theirs})
    return found


def patch() -> Patch:
    """Replaces the library's classes by the drop-ins, for all its kinds of models, wherever they are imported.

    Returns a Patch; its `.undo()`, or the end of a `with`, reverts it. With FUSEDLOSS_DISABLE=1 nothing is replaced.

    Example:
        >>> from fusedloss.integrations import sentence_transformers as fused
        >>> fused.patch()
    """
    replaced: dict[Any, Any] = {library_mine_hard_negatives: mine_hard_negatives}
    for name in ("", ".sparse_encoder", ".cross_encoder", ".multi_vector_encoder"):
        replaced.update(drop_ins(importlib.import_module(__name__ + name)))
    return Patch(replaced)
