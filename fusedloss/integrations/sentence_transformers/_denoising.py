"""A denoising auto-encoder, whose decoder scores every word of the vocabulary at every place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sentence_transformers.sentence_transformer.losses import DenoisingAutoEncoderLoss as _DenoisingAutoEncoderLoss
from torch import Tensor
from transformers import BertLMHeadModel, RobertaForCausalLM, XLMRobertaForCausalLM

import fusedloss
from fusedloss.core.checks import FLOATING

from .._drop_in import counted
from ._fits import fused, linear_fits

# Decoders whose logits are their output embeddings' linear layer, with nothing after it.
DECODERS = (BertLMHeadModel, RobertaForCausalLM, XLMRobertaForCausalLM)


class DenoisingAutoEncoderLoss(_DenoisingAutoEncoderLoss):
    """sentence-transformers' loss of this name. The vocabulary's logits are never stored, [places, words] of them."""

    @counted
    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        columns = tuple(sentence_features)
        if len(columns) != 2 or not fused(self, self._fits()):
            return super().forward(columns, labels)
        source, target = columns
        if self.need_retokenization:
            target = self.retokenize(target)
        words = target["input_ids"]
        reps = self.encoder(source)["sentence_embedding"]
        head: Any = self.decoder.get_output_embeddings()
        head.forward = lambda hidden: hidden
        try:
            hidden = self.decoder(
                input_ids=words[:, :-1],
                encoder_hidden_states=reps[:, None],
                encoder_attention_mask=source["attention_mask"][:, 0:1],
                use_cache=False,
            )[0]
        finally:
            del head.forward
        return fusedloss.linear_cross_entropy(
            hidden.flatten(0, 1),
            head.weight,
            words[:, 1:].flatten(),
            linear_bias=head.bias,
            ignore_index=self.tokenizer_decoder.pad_token_id,
        )

    def _fits(self) -> str | None:
        if type(self.decoder) not in DECODERS:
            return f"its decoder is a {type(self.decoder).__name__}"
        head = self.decoder.get_output_embeddings()
        if (why_not := linear_fits(head, "decoder's head")) is not None or head.weight.dtype not in FLOATING:
            return why_not or f"its decoder's head is {head.weight.dtype}"
        if not isinstance(self.tokenizer_decoder.pad_token_id, int):
            return "its tokenizer has no padding"
        return None
