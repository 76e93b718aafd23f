"""The table of cases: calls of every public loss, with every tensor argument that it takes.

A row gives a loss all of test_contract.py, and what else walks through all losses: inference tensors, narrow products,
launches, verdicts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fusedloss
from fusedloss import functional as F
from fusedloss import masks, transforms

D, CLASSES, COLUMNS = 6, 5, 4


class Case(NamedTuple):
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def result(self, **more: Any) -> Tensor:
        """Without statistics."""
        found = self.function(*self.arguments, **self.options | more)
        return found[0] if isinstance(found, tuple) else found

    @property
    def loss(self) -> Callable[..., Any]:
        """Of a modifier, the loss that it was given."""
        return next((x for x in self.arguments[:1] if inspect.isfunction(x)), self.function)

    def takes(self, option: str) -> bool:
        return option in inspect.signature(self.loss).parameters

    def as_module(self) -> tuple[nn.Module, dict[str, Any]] | None:
        """The loss's module, made with the options that are not its tensors, and those for `forward`.

        A module that is compiled once keeps its parameters: a learnt scale is a number here.
        """
        cls = MODULES.get(self.function)
        if cls is None:
            return None
        taken = inspect.signature(cls).parameters
        options = {name: value for name, value in self.options.items() if name in taken}
        learnt = {n: x.item() for n, x in options.items() if isinstance(x, Tensor) and not x.dim()}
        made = cls(**options | learnt)
        return made, {name: value for name, value in self.options.items() if name not in taken}


class Batch:
    """The tensors of a batch of some rows, the same for each batch of as many; `leaves` receive gradients.

    change: given each tensor, and its place in the order in which they are asked for, returns what is taken instead.
    """

    def __init__(
        self,
        rows: int,
        dtype: torch.dtype = torch.float64,
        change: Callable[[int, Tensor], Tensor] = lambda place, x: x,
    ):
        self.rows, self.dtype, self.asked = rows, dtype, 0
        self.leaves: list[Tensor] = []
        self._change = change

    def x(self, *shape: int) -> Tensor:
        """Embeddings, or other numbers that receive a gradient."""
        return self._leaf(self._numbers(*(shape or (self.rows, D))))

    def number(self, value: float) -> Tensor:
        return self._leaf(torch.tensor(value, dtype=self.dtype))

    def constant(self, x: Tensor) -> Tensor:
        self.asked += 1
        return self._change(self.asked - 1, x)

    def fixed(self, *shape: int) -> Tensor:
        """Numbers without a gradient."""
        return self.constant(self._numbers(*(shape or (self.rows, D))))

    def positive(self, *shape: int) -> Tensor:
        return self.constant(self._numbers(*(shape or (self.rows,))).abs() + 0.1)

    def below(self, end: int, *shape: int) -> Tensor:
        """Whole numbers: classes, labels of which each has two rows and more, ids."""
        shape = shape or (self.rows,)
        return self.constant((torch.arange(torch.Size(shape).numel()) % end).reshape(shape))

    def bits(self, *shape: int) -> Tensor:
        """True at least on the diagonal, and in the first column."""
        return self.constant(self._drawn(*shape))

    def zeros_and_ones(self) -> Tensor:
        return self.constant(self._drawn(self.rows, D).to(self.dtype))

    def shares(self, columns: int) -> Tensor:
        """Rows that sum to 1."""
        return self.constant(self._numbers(self.rows, columns).softmax(1))

    def chances(self, *shape: int) -> Tensor:
        """Numbers from 0 to 1."""
        return self.constant(self._numbers(*shape).sigmoid())

    def labels(self) -> Tensor:
        return self.below(3)

    def _leaf(self, x: Tensor) -> Tensor:
        taken = self.constant(x.requires_grad_())
        if getattr(taken, "requires_grad", False):
            self.leaves.append(taken)
        return taken

    def _drawn(self, *shape: int) -> Tensor:
        drawn = torch.rand(shape, generator=self._random()) < 0.6
        drawn.fill_diagonal_(True)
        drawn[:, :1] = True
        return drawn

    def _numbers(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._random(), dtype=torch.float64).to(self.dtype)

    def _random(self) -> torch.Generator:
        """What has no rows is the same in batches of any size: a module keeps it."""
        return torch.Generator().manual_seed(self.asked)


def _rows_and_columns(function: Callable[..., Tensor], **options: Any) -> Callable[[Batch], Case]:
    return lambda b: Case(function, (b.x(), b.x()), options)


def _labelled(function: Callable[..., Tensor], **options: Any) -> Callable[[Batch], Case]:
    return lambda b: Case(function, (b.x(), b.labels()), options)


def _info_nce(**made: Callable[[Batch], Any]) -> Callable[[Batch], Case]:
    return lambda b: Case(
        F.info_nce, (b.x(), b.x()), {"temperature": 0.5, **{name: make(b) for name, make in made.items()}}
    )


def _classes(function: Callable[..., Tensor], **options: Any) -> Callable[[Batch], Case]:
    return lambda b: Case(function, (b.x(), b.below(CLASSES), b.x(CLASSES, D)), options)


def _elements(function: Callable[..., Tensor], **options: Any) -> Callable[[Batch], Case]:
    return lambda b: Case(function, (b.x(), b.fixed()), options)


def _lists(function: Callable[..., Tensor], **options: Any) -> Callable[[Batch], Case]:
    return lambda b: Case(
        function, (b.x(b.rows, COLUMNS), b.below(3, b.rows, COLUMNS)), {"mask": b.bits(b.rows, COLUMNS), **options}
    )


def _gold(function: Callable[..., Tensor], **options: Any) -> Callable[[Batch], Case]:
    return lambda b: Case(function, (b.x(), b.x(), b.positive()), options)


def _same(function: Callable[..., Tensor], **options: Any) -> Callable[[Batch], Case]:
    return lambda b: Case(function, (b.x(), b.x(), b.below(2)), options)


def _layers(b: Batch) -> tuple[Tensor, Tensor]:
    return b.x(2, b.rows, D), b.x(2, b.rows, D)


# By the function's name and, behind a comma, what is particular about the call.
CASES: dict[str, Callable[[Batch], Case]] = {
    "adaptive_layer": lambda b: Case(F.adaptive_layer, (F.info_nce, *_layers(b)), {"temperature": 0.5}),
    "adr_mse": _lists(F.adr_mse),
    "angle": _gold(F.angle),
    "angle, negatives": lambda b: Case(F.angle, (b.x(), b.x(), b.x(), b.x()), {"label": b.positive()}),
    "arcface": _classes(F.arcface, scale=4.0),
    "batch_all_triplet": _labelled(F.batch_all_triplet, margin=1.0),
    "batch_hard_soft_margin_triplet": _labelled(F.batch_hard_soft_margin_triplet),
    "batch_hard_triplet": _labelled(F.batch_hard_triplet, margin=1.0),
    "batch_semi_hard_triplet": _labelled(F.batch_semi_hard_triplet, distance="cosine"),
    "binary_cross_entropy_with_logits": lambda b: Case(
        F.binary_cross_entropy_with_logits, (b.x(), b.zeros_and_ones()), {"weight": b.positive(D)}
    ),
    "binary_cross_entropy_with_logits, pos_weight": lambda b: Case(
        F.binary_cross_entropy_with_logits, (b.x(), b.shares(D)), {"pos_weight": b.positive(D)}
    ),
    "circle": _labelled(F.circle, gamma=8.0),
    "clip": lambda b: Case(F.clip, (b.x(), b.x(), b.number(2.0), b.number(-0.5)), {"normalize": True}),
    "clip, mask": lambda b: Case(
        F.clip, (b.x(), b.x(), 2.0), {"mask": masks.same_id(b.labels(), b.labels()) & b.bits(b.rows, b.rows)}
    ),
    "clip, debiased, mask": lambda b: Case(
        F.clip, (b.x(), b.x(), b.number(2.0)), {"normalize": True, "debiased": 0.1, "mask": b.bits(b.rows, b.rows)}
    ),
    "clip_distill": lambda b: Case(
        F.clip_distill, (b.x(), b.x(), b.number(2.0), b.fixed(b.rows, 3), b.fixed(b.rows, 3), 3.0), {}
    ),
    "clip_distill, teacher's scale": lambda b: Case(
        F.clip_distill,
        (b.x(), b.x(), 2.0, b.fixed(b.rows, 3), b.fixed(b.rows, 3), b.constant(torch.tensor(3.0, dtype=b.dtype))),
        {"normalize": True},
    ),
    "contrastive": _same(F.contrastive),
    "contrastive, euclidean": _same(F.contrastive, distance="euclidean", margin=2.0),
    "contrastive_tension": _same(F.contrastive_tension),
    "contrastive_tension_in_batch": lambda b: Case(F.contrastive_tension_in_batch, (b.x(), b.x(), b.number(3.0)), {}),
    "cosent": _gold(F.cosent, scale=4.0),
    "cosent, scale": lambda b: Case(
        F.cosent, (b.x(), b.x(), b.positive()), {"scale": b.number(4.0), "similarity": "euclidean"}
    ),
    "cosface": _classes(F.cosface, scale=4.0),
    "cosine_similarity": _gold(F.cosine_similarity),
    "cosine_similarity, functions": _gold(F.cosine_similarity, loss=nn.L1Loss(), transform=nn.Sigmoid()),
    "cross_entropy": lambda b: Case(F.cross_entropy, (b.x(b.rows, CLASSES), b.below(CLASSES)), {"z_loss": 0.1}),
    "cross_entropy, weight": lambda b: Case(
        F.cross_entropy, (b.x(b.rows, CLASSES), b.below(CLASSES)), {"weight": b.positive(CLASSES), "softcap": 3.0}
    ),
    "cross_entropy, probabilities": lambda b: Case(
        F.cross_entropy, (b.x(b.rows, CLASSES), b.shares(CLASSES)), {"label_smoothing": 0.1}
    ),
    "decoupled_contrastive": _rows_and_columns(F.decoupled_contrastive),
    "distill_kl_div": lambda b: Case(F.distill_kl_div, (b.x(), b.x(), b.x()), {"label": b.fixed(b.rows, 2)}),
    "distill_kl_div, temperatures": lambda b: Case(
        F.distill_kl_div,
        (b.x(), b.x(), b.x()),
        {"label": b.fixed(b.rows, 2), "student_temperature": b.number(2.0), "teacher_temperature": 3.0},
    ),
    "embed_distill": lambda b: Case(F.embed_distill, (b.x(), b.fixed()), {}),
    "embed_distill, columns": lambda b: Case(
        F.embed_distill, ([b.x(), b.x()], b.fixed(b.rows, 2, 4)), {"distance": "l2", "projection": b.x(4, D)}
    ),
    "focal": lambda b: Case(F.focal, (b.x(), b.zeros_and_ones()), {"alpha": 0.25}),
    "focal, classes": lambda b: Case(F.focal, (b.x(b.rows, CLASSES), b.below(CLASSES)), {"alpha": b.positive(CLASSES)}),
    "gist_embed": lambda b: Case(
        F.gist_embed,
        (b.x(), b.x(), b.x()),
        {"guide": (b.fixed(b.rows, 3), b.fixed(b.rows, 3), b.fixed(b.rows, 3)), "temperature": 0.5},
    ),
    "gist_embed, ids": lambda b: Case(
        F.gist_embed,
        (b.x(), b.x()),
        {"guide": (b.fixed(b.rows, 3), b.fixed(b.rows, 3)), "ids": (b.below(4), b.below(5)), "temperature": 0.5},
    ),
    "global_orthogonal_regularization": _rows_and_columns(F.global_orthogonal_regularization),
    "huber": _elements(F.huber, delta=0.5),
    "huber, weight": lambda b: Case(F.huber, (b.x(), b.fixed()), {"weight": b.positive(b.rows, 1)}),
    "in_batch_margin_ranking": _rows_and_columns(F.in_batch_margin_ranking),
    "info_nce": _info_nce(),
    "info_nce_distill": lambda b: Case(
        F.info_nce_distill,
        (b.x(), b.x(), b.fixed(b.rows, 3), b.fixed(b.rows, 3)),
        {"temperature": 0.5},
    ),
    "info_nce_distill, negatives": lambda b: Case(
        F.info_nce_distill,
        (b.x(), b.x(), b.fixed(b.rows, 3), b.fixed(b.rows, 3)),
        {
            "temperature": b.number(0.5),
            "form": "mse",
            "directions": ("query_to_key", "key_to_query"),
            "normalize": True,
            "negatives": b.x(b.rows, 2, D),
            "teacher_negatives": b.fixed(b.rows, 2, 3),
            "negatives_mask": b.bits(b.rows, 2),
            "mask": masks.same_id(b.labels(), b.labels()),
        },
    ),
    "info_nce, normalize": _info_nce(temperature=lambda b: b.number(0.5), normalize=lambda b: True),
    "info_nce, none": _info_nce(reduction=lambda b: "none"),
    "info_nce, stats": _info_nce(return_stats=lambda b: True),
    "info_nce, target, bias, weight": lambda b: Case(
        F.info_nce,
        (b.x(), b.x(), b.below(3)),
        {"key_bias": b.x(b.rows), "weight": b.positive(), "label_smoothing": 0.1},
    ),
    "info_nce, bank": _info_nce(bank=lambda b: b.fixed(7, D), key_bias=lambda b: b.fixed(b.rows + 7)),
    "info_nce, negatives": _info_nce(negatives=lambda b: b.x(b.rows, 2, D)),
    "info_nce, negatives_mask": _info_nce(
        negatives=lambda b: b.x(b.rows, 2, D), negatives_mask=lambda b: b.bits(b.rows, 2)
    ),
    "info_nce, bool": _info_nce(mask=lambda b: b.bits(b.rows, b.rows)),
    "info_nce, same_id": _info_nce(mask=lambda b: masks.same_id(b.labels(), b.labels())),
    "info_nce, same_group": _info_nce(mask=lambda b: masks.same_group(b.labels(), b.labels())),
    "info_nce, score_margin": _info_nce(mask=lambda b: masks.score_margin(0.1, b.below(3, b.rows, 2))),
    "info_nce, score_margin, factor": _info_nce(mask=lambda b: masks.score_margin(-0.5, factor=0.5)),
    "info_nce, guide": _info_nce(mask=lambda b: masks.guide(b.fixed(b.rows, 3), b.fixed(b.rows, 3), margin=0.1)),
    "info_nce, not_self": _info_nce(mask=lambda b: masks.not_self(1)),
    "info_nce, debiased": _info_nce(debiased=lambda b: 0.1, normalize=lambda b: True),
    "info_nce, debiased, bias, mask": _info_nce(
        debiased=lambda b: 0.1,
        temperature=lambda b: b.number(0.5),
        normalize=lambda b: True,
        key_bias=lambda b: b.x(b.rows),
        mask=lambda b: masks.same_id(b.labels(), b.labels()),
    ),
    "info_nce, several positives": lambda b: Case(
        F.info_nce,
        (b.x(), b.x(), b.below(b.rows or 1, b.rows, 3)),
        {"key_bias": b.x(b.rows), "temperature": b.number(0.5)},
    ),
    "info_nce, several positives, joint": lambda b: Case(
        F.info_nce, (b.x(), b.x(), b.below(b.rows or 1, b.rows, 2)), {"positives": "joint", "normalize": True}
    ),
    "info_nce, teacher_scores": _info_nce(
        negatives=lambda b: b.x(b.rows, 2, D), teacher_scores=lambda b: b.fixed(b.rows, 3)
    ),
    "info_nce, transform": _info_nce(transform=lambda b: transforms.focal(1.5)),
    "info_nce, decoupled, bias": _info_nce(
        decoupled=lambda b: True,
        normalize=lambda b: True,
        key_bias=lambda b: b.fixed(b.rows),
        bias_on_target=lambda b: False,
        transform=lambda b: transforms.generalised(0.5),
    ),
    "info_nce, frozen": lambda b: Case(F.info_nce, (b.x(), b.fixed()), {"temperature": 0.5, "normalize": True}),
    "l1": _elements(F.l1, under=2.0),
    "lambda_loss": _lists(F.lambda_loss),
    "lambda_loss, k": lambda b: Case(F.lambda_loss, (b.x(b.rows, COLUMNS), b.below(3, b.rows, COLUMNS)), {"k": 2}),
    "linear_cross_entropy": lambda b: Case(
        F.linear_cross_entropy,
        (b.x(), b.x(CLASSES, D), b.below(CLASSES)),
        {"linear_bias": b.x(CLASSES), "softcap": 5.0, "z_loss": 0.1},
    ),
    "linear_cross_entropy, stats": lambda b: Case(
        F.linear_cross_entropy,
        (b.x(), b.x(CLASSES, D), b.below(CLASSES)),
        {"linear_bias": b.x(CLASSES), "temperature": 0.7, "return_stats": True},
    ),
    "linear_cross_entropy, weight": lambda b: Case(
        F.linear_cross_entropy,
        (b.x(), b.x(CLASSES, D), b.below(CLASSES)),
        {"weight": b.positive(CLASSES), "label_smoothing": 0.1},
    ),
    "list_circle": _lists(F.list_circle, gamma=3.0),
    "list_info_nce": lambda b: Case(
        F.list_info_nce,
        (b.x(b.rows, COLUMNS), b.below(3, b.rows, COLUMNS)),
        {"mask": b.bits(b.rows, COLUMNS), "temperature": b.number(0.7)},
    ),
    "list_info_nce, joint": _lists(F.list_info_nce, positives="joint"),
    "list_mle": _lists(F.list_mle, respect_input_order=False),
    "list_net": _lists(F.list_net),
    "margin_mse": lambda b: Case(F.margin_mse, (b.x(), b.x(), b.x()), {"label": b.fixed(b.rows)}),
    "margin_mse, negatives": lambda b: Case(
        F.margin_mse, (b.x(), b.x(), b.x(), b.x()), {"label": b.fixed(b.rows, 3), "similarity": "cos"}
    ),
    "matryoshka": lambda b: Case(F.matryoshka, (F.info_nce, b.x(), b.x()), {"dims": (6, 3), "temperature": 0.5}),
    "matryoshka, cosent": lambda b: Case(
        F.matryoshka, (F.cosent, b.x(), b.x()), {"dims": (6, 3), "weights": (1.0, 0.5), "score": b.positive()}
    ),
    "matryoshka_2d": lambda b: Case(
        F.matryoshka_2d, (F.info_nce, *_layers(b)), {"dims": (6, 3), "layer_indices": [0], "temperature": 0.5}
    ),
    "mega_batch_margin": _rows_and_columns(F.mega_batch_margin),
    "mse": _elements(F.mse),
    "mse, weight": lambda b: Case(F.mse, (b.x(), b.fixed()), {"weight": b.positive(D)}),
    "multi_similarity": _labelled(F.multi_similarity, beta=8.0),
    "multiple_negatives_ranking": lambda b: Case(
        F.multiple_negatives_ranking, (b.x(), b.x(), b.x()), {"scale": b.number(3.0)}
    ),
    "multiple_negatives_ranking, directions": lambda b: Case(
        F.multiple_negatives_ranking,
        (b.x(), b.x()),
        {
            "scale": 3.0,
            "directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),
            "hardness_mode": "in_batch_negatives",
            "hardness_strength": 1.0,
        },
    ),
    "multiple_negatives_ranking, own_negatives": lambda b: Case(
        F.multiple_negatives_ranking,
        (b.x(), b.x(), b.x(), b.x()),
        {"scale": b.number(3.0), "negatives_mask": b.bits(b.rows, 2), "own_negatives": True},
    ),
    "multiple_negatives_ranking, negatives_mask": lambda b: Case(
        F.multiple_negatives_ranking,
        (b.x(), b.x(), b.x(), b.x()),
        {"scale": 3.0, "negatives_mask": b.bits(b.rows, 2), "directions": ("query_to_doc", "doc_to_doc")},
    ),
    "multiple_negatives_ranking, mask": lambda b: Case(
        F.multiple_negatives_ranking, (b.x(), b.x()), {"scale": 3.0, "mask": masks.same_id(b.labels(), b.labels())}
    ),
    "multiple_negatives_ranking, ids": lambda b: Case(
        F.multiple_negatives_ranking,
        (b.x(), b.x(), b.x()),
        {"scale": 3.0, "ids": (b.below(4), b.below(5), b.below(6)), "directions": ("query_to_doc", "doc_to_doc")},
    ),
    "nt_xent": _rows_and_columns(F.nt_xent),
    "online_contrastive": _same(F.online_contrastive),
    "plist_mle": _lists(F.plist_mle),
    "proxy_anchor": _classes(F.proxy_anchor, alpha=4.0),
    "proxy_nca": lambda b: Case(
        F.proxy_nca, (b.x(), b.below(CLASSES), b.x(CLASSES, D)), {"scale": b.number(2.0), "decoupled": True}
    ),
    "rank_net": _lists(F.rank_net),
    "rank_net, soft": lambda b: Case(
        F.rank_net,
        (b.x(b.rows, COLUMNS),),
        {"soft": b.chances(b.rows, COLUMNS, COLUMNS), "mask": b.bits(b.rows, COLUMNS)},
    ),
    "rank_net, reference": lambda b: Case(
        F.rank_net,
        (b.x(b.rows, COLUMNS), b.below(3, b.rows, COLUMNS)),
        {"reference": b.fixed(b.rows, COLUMNS), "sigma": 0.5},
    ),
    "siglip": lambda b: Case(F.siglip, (b.x(), b.x(), b.number(2.0), b.number(-0.5)), {"normalize": True}),
    "siglip, target": lambda b: Case(F.siglip, (b.x(), b.x(), 2.0), {"target": b.below(3)}),
    "siglip, same_id": lambda b: Case(F.siglip, (b.x(), b.x(), 2.0), {"target": masks.same_id(b.labels(), b.labels())}),
    "smooth_l1": _elements(F.smooth_l1, beta=0.5),
    "smooth_l1, weight": lambda b: Case(F.smooth_l1, (b.x(), b.fixed()), {"weight": b.positive(b.rows, 1)}),
    "softmax_pair": lambda b: Case(
        F.softmax_pair,
        (b.x(), b.x(), b.x(CLASSES, 3 * D), b.x(CLASSES), b.below(CLASSES)),
        {"class_weight": b.positive(CLASSES)},
    ),
    "softmax_pair, probabilities": lambda b: Case(
        F.softmax_pair,
        (b.x(), b.x(), b.x(CLASSES, D), None, b.shares(CLASSES)),
        {"concatenation": ("multiplication",)},
    ),
    "sup_con": _labelled(F.sup_con),
    "sup_con, transform": _labelled(F.sup_con, temperature=0.5, transform=transforms.focal(1.5)),
    "sup_con, in": _labelled(F.sup_con, form="in"),
    "triplet": lambda b: Case(F.triplet, (b.x(), b.x(), b.x()), {}),
    "triplet, cosine": lambda b: Case(F.triplet, (b.x(), b.x(), b.x()), {"distance": "cosine", "margin": 0.5}),
}

MODULES: dict[Callable[..., Any], type[nn.Module]] = {
    cls.function: cls for cls in vars(fusedloss).values() if isinstance(cls, type) and issubclass(cls, nn.Module)
}


def missing() -> set[str]:
    """Public losses and modules without a call."""
    called = {call(Batch(4)).function for call in CASES.values()}
    functions = {name for name in F.__all__ if getattr(F, name) not in called}
    classes = {cls for cls in vars(fusedloss).values() if isinstance(cls, type) and issubclass(cls, nn.Module)}
    return functions | {cls.__name__ for cls in classes if cls not in MODULES.values()}


# What no kernel of Triton computes: backend="triton" raises.
WITHOUT_TRITON = {
    *("info_nce, score_margin, factor", "list_circle", "list_info_nce", "list_info_nce, joint", "rank_net, soft"),
}
