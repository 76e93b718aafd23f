"""Losses of published embedding models, by name: calls of this package's losses with the papers' settings.

Each takes embeddings of one batch, not yet normalised, and returns the mean loss. `reduction`, `backend`,
`workspace_bytes` and the rest of a loss's options stand in the loss itself: these are calls to copy and to change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import functional, masks, transforms
from .core import checks
from .core.mask import Mask
from .core.numerics import row_numbers
from .losses._options import Call
from .losses._softmax import mean_of
from .losses.embed_distill import projected
from .losses.multiple_negatives_ranking import multiple_negatives_ranking_problems
from .losses.orthogonal import means


def qwen3_embedding(
    query: Tensor, positive: Tensor, *negatives: Tensor, temperature: float | Tensor = 0.02, margin: float = 0.1
) -> Tensor:
    """Qwen3-Embedding (arXiv 2506.05176): three kinds of in-batch negatives without those that look like positives.

        loss_i = -log(e^(s(q_i, d_i) / t) / Z_i)

    `Z_i` sums over the row's own positive, its own hard negatives, and, where the similarity is at most
    `s(q_i, d_i) + margin`: the other documents with q_i, the other queries with q_i, and the other rows' documents with
    d_i. Similarities are cosines.

    Args:
        query, positive: `[B, D]`. negatives: any number of `[B, D]`, row i of each a hard negative of query i, which
            the margin never drops from its own row.
        temperature: a positive number, or a tensor of one element, which receives a gradient.
        margin: by how much an in-batch negative may be closer than the positive.

    Raises:
        ValueError, TypeError: a shape, dtype, device or number that does not fit.

    Example:
        >>> recipes.qwen3_embedding(encode(questions), encode(answers), encode(near_misses)).backward()
    """
    checks.embeddings(query=query, positive=positive, **{f"negatives[{i}]": x for i, x in enumerate(negatives)})
    checks.number("margin", margin)
    checks.scalar("temperature", temperature, query, positive=True)
    rows = len(query)
    for name, x in (("positive", positive), *((f"negatives[{i}]", x) for i, x in enumerate(negatives))):
        if len(x) != rows:
            raise ValueError(f"{name} must have {rows} rows, like query, got {len(x)}")
    own = row_numbers(rows, query)[:, None]
    curated = torch.cat([own + rows * column for column in range(1, len(negatives) + 1)], 1) if negatives else None
    call = Call()
    problems = multiple_negatives_ranking_problems(
        query,
        positive,
        *negatives,
        scale=1 / temperature,
        similarity="cos",
        directions=("query_to_doc", "query_to_query", "doc_to_doc"),
        partition_mode="joint",
        hardness_mode=None,
        hardness_strength=0.0,
        mask=masks.score_margin(margin, exempt=curated),
        call=call,
        elsewhere=Mask(margin=float(margin)),
    )
    return mean_of(problems, call)


def embedding_gemma(
    query: Tensor,
    positive: Tensor,
    negative: Tensor | None = None,
    *,
    teacher: Sequence[Tensor] = (),
    scale: float | Tensor = 20.0,
    hardness: float = 5.0,
    spread: float = 1.0,
    matching: float = 1.0,
) -> Tensor:
    """EmbeddingGemma (arXiv 2509.20354): contrastive loss with hardness weights, spread-out, and embedding matching.

        contrast_i = -log(e^(scale s(q_i, p_i)) / (sum_j e^(scale s(q_i, p_j)) + w_i e^(scale s(q_i, n_i)) + ...))
        w_i        = e^(hardness s(q_i, n_i)), a constant to the gradient
        loss       = mean contrast + spread (second moment of the queries + that of the positives)
                     + matching (sum over the given embeddings of the mean distance to the teacher's)
        second moment of X: mean_{i != j} cos(x_i, x_j)^2

    The other rows' hard negatives are negatives of every row, without a weight.

    Args:
        query, positive, negative: `[B, D]`; row i of `negative` is the hard negative of query i.
        teacher: the teacher's embeddings of query, positive and, if given, negative, `[B, D]` each; none: no matching.
        scale: the inverse temperature: a number, or a tensor of one element, which receives a gradient.
        hardness, spread, matching: the weights of the parts.

    Raises:
        ValueError, TypeError: a shape, dtype, device or number that does not fit.

    Example:
        >>> recipes.embedding_gemma(encode(questions), encode(answers), encode(near_misses)).backward()
    """
    columns = [x for x in (query, positive, negative) if x is not None]
    for name, value in {"hardness": hardness, "spread": spread, "matching": matching}.items():
        checks.number(name, value, least=0)
    checks.sequence("teacher", teacher, "embeddings", "(teacher_query, teacher_positive)")
    if len(teacher) not in (0, len(columns)):
        raise ValueError(f"teacher must hold {len(columns)} tensors, one for each of the model's, got {len(teacher)}")
    loss: Tensor = functional.multiple_negatives_ranking(
        *columns,
        scale=scale,
        hardness_mode=None if negative is None else "hard_negatives",
        hardness_strength=0.0 if negative is None else hardness,
    )
    if spread:
        second = means(query, True)[1] + means(positive, True)[1]
        loss = loss + (spread * second).to(loss.dtype)
    for own, other in zip(columns, teacher, strict=False):
        loss = loss + matching * functional.embed_distill(own, other, distance="l2")
    return loss


def kalm_embedding_v2(
    query: Tensor, positive: Tensor, *negatives: Tensor, scale: float | Tensor = 50.0, gamma: float = 0.5
) -> Tensor:
    """KaLM-Embedding-V2 (arXiv 2506.20923): InfoNCE whose rows count by their miss, `(1 - p_i)^gamma`, a constant.

    query, positive: `[B, D]`. negatives: any number of `[B, D]`. scale: the inverse temperature.

    Example:
        >>> recipes.kalm_embedding_v2(encode(questions), encode(answers), encode(near_misses)).backward()
    """
    phi = transforms.focal(gamma, detach=True)
    loss: Tensor = functional.multiple_negatives_ranking(query, positive, *negatives, scale=scale, transform=phi)
    return loss


def nv_retriever(query: Tensor, positive: Tensor, *, scale: float | Tensor = 50.0, share: float = 0.95) -> Tensor:
    """NV-Retriever's rule (arXiv 2407.15831) on in-batch negatives: none above `share` of the positive's.

    query, positive: `[B, D]`. scale: the inverse temperature. share: of the positive's cosine, from which on a
    negative is taken for a false one.

    Example:
        >>> recipes.nv_retriever(encode(questions), encode(answers)).backward()
    """
    mask = masks.score_margin(relative=share)
    loss: Tensor = functional.multiple_negatives_ranking(query, positive, scale=scale, mask=mask)
    return loss


def sim_kgc(query: Tensor, key: Tensor, *, temperature: float = 0.05, margin: float = 0.02) -> Tensor:
    """SimKGC's and LaBSE's additive margin: InfoNCE whose positives' cosines are `margin` lower.

    query, key: `[B, D]`.

    Example:
        >>> recipes.sim_kgc(encode(heads), encode(tails)).backward()
    """
    loss: Tensor = functional.info_nce(query, key, temperature=temperature, margin=margin, normalize=True)
    return loss


def refined_logq(
    query: Tensor, key: Tensor, probability: Tensor, *, temperature: float | Tensor = 0.05, normalize: bool = True
) -> Tensor:
    """The refined logQ correction (arXiv 2507.09331) of keys that are drawn by their popularity.

        l_i  = -log(e^(z_ii) / (e^(z_ii) + sum_(j != i) e^(z_ij - log Q_j))),    z_ij = s(query_i, key_j) / temperature
        loss = mean of (1 - e^-l_i) l_i, whose factor is a constant to the gradient

    query, key: `[B, D]`. probability: `[B]`, Q_j, above 0: how probably key j is drawn. temperature: a positive number,
    or a tensor of one element, which receives a gradient. normalize: s is the cosine; otherwise the dot product.

    Example:
        >>> recipes.refined_logq(encode(users), encode(items), count / count.sum()).backward()
    """
    checks.embeddings(query=query, key=key)
    checks.vector("probability", probability, len(key), "key", query)
    loss: Tensor = functional.info_nce(
        query,
        key,
        temperature=temperature,
        key_bias=-probability.detach().log(),
        bias_on_target=False,
        transform=transforms.refined_logq(),
        normalize=normalize,
    )
    return loss


def leaf(student: Tensor, teacher: Tensor, *, projection: Tensor | None = None, normalize: bool = True) -> Tensor:
    """LEAF (arXiv 2509.12539): the mean squared distance of a student's embeddings to a teacher's.

        loss_i = |y_i - t_i|^2,    y_i = projection student_i

    student: `[B, D]`. teacher: `[B, T]`, receives no gradient. projection: `[T, D]`, the last layer of the student,
    which learns; None where D is T. normalize: both are divided by their norms first, as a student's are whose teacher
    returns unit vectors: the loss is then `2 - 2 cos(y_i, t_i)`. False compares them as they are.

    Example:
        >>> recipes.leaf(encode(texts), teacher_embeddings, projection=last_layer.weight).backward()
    """
    checks.embeddings(student=student)
    checks.embeddings(teacher=teacher)
    if normalize:
        return 2 * functional.embed_distill(student, teacher, distance="cosine", projection=projection)
    return teacher.shape[1] * functional.embed_distill(student, teacher, distance="mse", projection=projection)


def jina_embeddings_v5(
    query: Tensor,
    document: Tensor,
    *negatives: Tensor,
    teacher: Sequence[Tensor],
    projection: Tensor | Callable[[Tensor], Tensor] | None = None,
    temperature: float | Tensor = 0.02,
    matching: float = 2.0,
    spread: float = 1.0,
) -> Tensor:
    """jina-embeddings-v5-text's retrieval (arXiv 2602.15547): InfoNCE, distances to a teacher and a spread-out term.

        contrast_i = -log(e^(s(q_i, d_i) / t) / sum_j (e^(s(q_i, d_j) / t) + sum_k e^(s(q_i, n_kj) / t)))
        match_i    = 1 - s(projection q_i, teacher_q_i) + 1 - s(projection d_i, teacher_d_i)
        loss       = mean contrast + matching * mean match
                     + spread * (second moment of the queries + that of the documents)
        second moment of X: mean_{i != j} s(x_i, x_j)^2

    Similarities are cosines. The paper adds up match over the rows; here its weight does not depend on the batch, and
    `matching=2 * len(query)` is the sum. The first stage, without contrast and spread, is match alone:
    `2 * embed_distill([query, document], teacher, projection=projection)`.
    The defaults are as summaries of the paper's appendix give them.

    Args:
        query, document: `[B, D]`. negatives: any number of `[B, D]`, hard negatives, each of which every row sees.
        teacher: the teacher's embeddings of query and document, `[B, T]` each, which receive no gradient.
        projection: from D to T: a weight `[T, D]` or a module such as `torch.nn.Linear(D, T)`; None where D is T.
        temperature: a positive number, or a tensor of one element, which receives a gradient, as the paper's does.
        matching, spread: the weights of the parts.

    Raises:
        ValueError, TypeError: a shape, dtype, device or number that does not fit.

    Example:
        >>> taught = teacher(questions), teacher(answers)
        >>> recipes.jina_embeddings_v5(encode(questions), encode(answers), teacher=taught, projection=linear).backward()
    """
    _check_pairs(query, document, teacher)
    checks.scalar("temperature", temperature, query, positive=True)
    for name, value in {"matching": matching, "spread": spread}.items():
        checks.number(name, value, least=0)
    loss: Tensor = functional.multiple_negatives_ranking(query, document, *negatives, scale=1 / temperature)
    match = 2 * functional.embed_distill([query, document], teacher, distance="cosine", projection=projection)
    loss = loss + matching * match
    if spread:
        second = means(query, True)[1] + means(document, True)[1]
        loss = loss + (spread * second).to(loss.dtype)
    return loss


def nemotron_embed(
    query: Tensor,
    document: Tensor,
    *,
    teacher: Sequence[Tensor],
    projection: Tensor | Callable[[Tensor], Tensor] | None = None,
    cosine: float = 1.0,
    squared: float = 1.0,
    listwise: float = 0.0,
    temperature: float = 0.05,
) -> Tensor:
    """The distillation of Nemotron-3-Embed-1B, as in the example of NVIDIA's NeMo Automodel: a teacher's embeddings.

        match_i = sum over (x, y) of (query, document) and its teacher, with u_i = projection x_i:
                  cosine (1 - cos(u_i, y_i)) + squared |u_i - y_i|^2 / T
        list_i  = KL(p_i || softmax_j(cos(query_i, document_j) / temperature)), and p_i likewise of the teacher's
        loss    = mean match + listwise * mean list

    Args:
        query, document: `[B, D]`.
        teacher: the teacher's embeddings of query and document, `[B, T]` each, which receive no gradient.
        projection: from D to T: a weight `[T, D]` or a module such as `torch.nn.Linear(D, T)`; None where D is T.
        cosine, squared, listwise: the weights of the parts. The example has the list's at 0: not computed.
        temperature: of both softmaxes, a positive number.

    Raises:
        ValueError, TypeError: a shape, dtype, device or number that does not fit.

    Example:
        >>> taught = teacher(questions), teacher(answers)
        >>> recipes.nemotron_embed(encode(questions), encode(answers), teacher=taught, projection=linear).backward()
    """
    _check_pairs(query, document, teacher)
    for name, value in {"cosine": cosine, "squared": squared, "listwise": listwise}.items():
        checks.number(name, value, least=0)
    checks.scalar("temperature", temperature, query, positive=True)
    students = projected([query, document], projection)
    angle, square = (
        2 * functional.embed_distill(students, teacher, distance=distance) for distance in ("cosine", "mse")
    )
    loss: Tensor = cosine * angle + squared * square
    if listwise:
        found = functional.info_nce_distill(
            query, document, *teacher, temperature=temperature, teacher_temperature=temperature, normalize=True
        )
        assert isinstance(found, Tensor)
        loss = loss + listwise * found
    return loss


def _check_pairs(query: Tensor, document: Tensor, teacher: Sequence[Tensor]) -> None:
    checks.embeddings(query=query, document=document)
    if len(query) != len(document):
        raise ValueError(f"document must have {len(query)} rows, like query, got {len(document)}")
    checks.sequence("teacher", teacher, "embeddings", "(teacher_query, teacher_document)")
    if len(teacher) != 2:
        raise ValueError(f"teacher must hold 2 tensors, of query and document, got {len(teacher)}")


def bge_m3(
    dense: Tensor,
    lexical: Tensor,
    multi_vector: Tensor,
    target: Tensor,
    *,
    temperature: float = 0.02,
    weights: Sequence[float] = (1.0, 0.3, 1.0),
    shares: Sequence[float] = (1.0, 0.1, 1.0),
) -> Tensor:
    """BGE-M3's self-distillation (arXiv 2402.03216): three kinds of scores learn from their weighted sum.

        s_inter = w_1 s_dense + w_2 s_lexical + w_3 s_multi
        L       = (c_1 L(s_dense) + c_2 L(s_lexical) + c_3 L(s_multi) + L(s_inter)) / 4
        L'      = (c_1 L'(s_dense) + c_2 L'(s_lexical) + c_3 L'(s_multi)) / 3
        L'(s)   = cross-entropy of softmax(s / temperature) with softmax(s_inter / temperature), a constant
        loss    = (L + L') / 2,      L(s): InfoNCE of s / temperature

    dense, lexical, multi_vector: scores `[Q, n]` of each query's candidates. target: int64 `[Q]`, the column of the
    positive. weights: w. shares: c. The defaults are the authors' (FlagEmbedding).

    Example:
        >>> recipes.bge_m3(dense, lexical, multi_vector, torch.zeros(len(dense), dtype=torch.long)).backward()
    """
    for name, numbers in {"weights": weights, "shares": shares}.items():
        checks.sequence(name, numbers, "numbers", "(1.0, 0.3, 1.0)")
        if len(numbers) != 3:
            raise ValueError(f"{name} must hold 3 numbers, of dense, lexical and multi_vector, got {len(numbers)}")
    checks.number("temperature", temperature)
    if temperature <= 0:
        raise ValueError(f"temperature must be a positive number, got {temperature}")
    each = [s / temperature for s in (dense, lexical, multi_vector)]
    joint = sum(w * z for w, z in zip(weights, each, strict=True))
    assert isinstance(joint, Tensor)
    teacher = joint.detach().softmax(1)
    loss = functional.cross_entropy(joint, target) / 4
    for c, z in zip(shares, each, strict=True):
        loss = loss + c * (functional.cross_entropy(z, target) / 4 + functional.cross_entropy(z, teacher) / 3)
    return loss / 2
