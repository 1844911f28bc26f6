"""What each model file of the installed transformers does with masks and names that patterns depend on: a new one is looked at first."""

from __future__ import annotations

import functools

from tests.models import model_files

# Layers with a pattern run their module's own forward, which asks for the implementation's name there: why nothing is lost.
NAMES = {
    "axk2": "an indexer's choice of keys; the pattern takes its place. Masks and native patterns are refused (indexed_attention)",
    "decision_transformer": "asks for eager to compute the scores in another order; the interface, and so the pattern, is called otherwise",
    "deepseek_v32": "as axk2",
    "dots3_note": "as axk2",
    "glm5_next": "makes a mask of its own from an indexer's choice: layers with a pattern refuse it when called",
    "glm_moe_dsa": "as axk2",
    "gpt2": "as decision_transformer",
    "hy_v4": "as axk2",
    "kosmos2_5": "a vision tower that is always eager, and no layer of the text",
    "minimax_m3_vl": "as axk2 (minimax_m3_sparse)",
    "mistral_large4": "as axk2",
}

# Masks that are changed between transformers' mask functions and the attention function. Native layers see the native mask, so all of this
# is as without patterns; a layer with a pattern refuses a mask that was changed, but for a part of its queries. Why each is safe:
_REFUSED = "layers with a pattern refuse the changed mask when called"
_OTHER = "another mask than the one of the text's layers (2-D, or of an image, a sound, a pair)"
_CLOSED = "its attention does not call the interface: models.apply refuses"
_TWO_STACKS = "encoder and decoder: models.apply refuses"
MASKS = {
    "aria": _OTHER,
    "axk2": "an indexer reads it; the pattern takes the place of what it chooses",
    "beit": _OTHER,
    "big_bird": _CLOSED,
    "bigbird_pegasus": _TWO_STACKS,
    "deepseek_v32": "as axk2",
    "deepseek_v4": f"compressed keys stand behind the others: {_REFUSED}",
    "dots3_note": "as axk2",
    "esmfold2": _OTHER,
    "falcon": _CLOSED,
    "gemma3n": _OTHER,
    "gemma4_assistant": _REFUSED,
    "gemma4_unified_assistant": _REFUSED,
    "glm5_next": _OTHER,
    "glm_moe_dsa": "as axk2",
    "granite_speech5": _OTHER,
    "hy_v4": "as axk2",
    "longformer": _CLOSED,
    "luke": _CLOSED,
    "mistral_large4": "as axk2",
    "nemotron_asr_streaming": _OTHER,
    "parakeet": _OTHER,
    "pix2struct": _TWO_STACKS,
    "qwen4_exp": f"an indexer's choice of keys is joined to it: {_REFUSED}",
    "siglip2": _OTHER,
    "swin": _OTHER,
    "switch_transformers": _TWO_STACKS,
    "t5gemma2": _TWO_STACKS,
    "visual_bert": _CLOSED,
    "xlnet": _CLOSED,
}

# What attention functions are given by name, and what becomes of it in a layer with a pattern.
READ = {"scaling", "dropout", "output_attentions", "position_bias", "s_aux", "softcap", "attention_mask", "query", "key", "value"}
SAID_OTHERWISE = {"is_causal", "sliding_window"}  # in the mask, as native patterns have it; a pattern takes their place
FLASH_ONLY = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "deterministic", "position_ids"}
CHOICES = {"indices", "block_indices"}  # of an indexer: a pattern takes their place
REFUSED = {"sinks"}  # of inkling2, beside a position bias

# Layers that read the keys of earlier ones, told by the attribute is_kv_shared_layer (diffusion_gemma: in a comment only).
SHARED_KEYS = {"diffusion_gemma", "gemma3n", "gemma4", "gemma4_unified", "mistral_large4"}


@functools.cache
def found() -> dict[str, set[str]]:
    names, masks, words, shared = set(), set(), set(), set()
    for folder, source in model_files.files():
        if "is_kv_shared_layer" in source:
            shared.add(folder)
        for block in model_files.classes(source):
            names |= {folder} if model_files.reads_the_name(block) else set()
            masks |= {folder} if model_files.changed_masks(block) else set()
            words |= model_files.keywords(block)
    return {"names": names, "masks": masks, "words": words, "shared": shared}


def assert_known(what: str, known: set[str], question: str) -> None:
    new, gone = found()[what] - known, known - found()[what]
    assert not new, f"this transformers has model files that nobody has looked at: {sorted(new)}. {question}"
    assert not gone, f"no longer in this transformers; take it out of the list here: {sorted(gone)}"


def test_files_whose_attention_asks_for_the_name_of_the_implementation() -> None:
    question = (
        "What does a layer with a pattern do otherwise, whose module reads 'sparsedsl'? Answer in NAMES, or refuse the file"
    )
    assert_known("names", set(NAMES), question)


def test_files_that_change_a_mask_on_its_way() -> None:
    question = (
        "Is the changed mask that of layers which can have patterns, and do these refuse it? Answer in MASKS, or refuse the file"
    )
    assert_known("masks", set(MASKS), question)


def test_words_that_attention_functions_are_given() -> None:
    known = READ | SAID_OTHERWISE | FLASH_ONLY | CHOICES | REFUSED
    assert_known("words", known, "What does a layer with a pattern lose when it does not read them? Read or refuse them")


def test_files_whose_layers_share_keys() -> None:
    assert_known("shared", SHARED_KEYS, "Does layers.key_owners find whose keys a layer reads?")
