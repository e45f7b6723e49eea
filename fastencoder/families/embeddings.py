"""Text embeddings that are `LayerNorm(word + type + position)`: where they keep their tables, and how they count positions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EmbeddingAdapter:
    """How to read one class of embeddings.

    Args:
        counts_padding: True where position ids run through the buffer `position_ids`, padding or not; False where the class
            makes them from the ids (`create_position_ids_from_input_ids`), skipping padding.
        has_types: whether there is a table of token types.
    """

    counts_padding: bool
    has_types: bool = True


BERT = EmbeddingAdapter(counts_padding=True)
DISTILBERT = EmbeddingAdapter(counts_padding=True, has_types=False)
ROBERTA = EmbeddingAdapter(counts_padding=False)

_MODELS = "transformers.models"

# By qualified name. The parts have the same names in all of them: word_embeddings, position_embeddings,
# token_type_embeddings, LayerNorm, dropout.
EMBEDDINGS: dict[str, EmbeddingAdapter] = {
    f"{_MODELS}.albert.modeling_albert.AlbertEmbeddings": BERT,
    f"{_MODELS}.bert.modeling_bert.BertEmbeddings": BERT,
    f"{_MODELS}.electra.modeling_electra.ElectraEmbeddings": BERT,
    f"{_MODELS}.distilbert.modeling_distilbert.Embeddings": DISTILBERT,
    f"{_MODELS}.altclip.modeling_altclip.AltRobertaEmbeddings": ROBERTA,
    f"{_MODELS}.camembert.modeling_camembert.CamembertEmbeddings": ROBERTA,
    f"{_MODELS}.clap.modeling_clap.ClapTextEmbeddings": ROBERTA,
    f"{_MODELS}.data2vec.modeling_data2vec_text.Data2VecTextEmbeddings": ROBERTA,
    f"{_MODELS}.roberta.modeling_roberta.RobertaEmbeddings": ROBERTA,
    f"{_MODELS}.roberta_prelayernorm.modeling_roberta_prelayernorm.RobertaPreLayerNormEmbeddings": ROBERTA,
    f"{_MODELS}.xlm_roberta.modeling_xlm_roberta.XLMRobertaEmbeddings": ROBERTA,
    f"{_MODELS}.xmod.modeling_xmod.XmodEmbeddings": ROBERTA,
}
