"""Free greedy generation to the end of the turn, and whether it equals the completion."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from rankloom.data.render import Row
from rankloom.evals.batches import bears_padding, device_of, evaluating, keeps_cache, left_padded, prompt_of, unwrapped

ROOM = 8
"""Tokens allowed beyond the longest completion: enough to see that a generation does not end where it should."""

# a model's own generation settings, such as a repetition penalty, fill whatever is not given
PLAIN_GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
}


def exact_matches(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, batch_size: int
) -> list[bool]:
    """Whether the text generated from each row's prompt is the row's completion, white space around it aside."""
    texts = generate_completions(model, tokenizer, rows, batch_size=batch_size)
    # the completion is read back from its tokens, as the generation is: a tokenizer may normalise text
    wanted = [_text(tokenizer, row.input_ids[row.prompt_length :]) for row in rows]
    return [text == want for text, want in zip(texts, wanted, strict=True)]


def generate_completions(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, batch_size: int
) -> list[str]:
    """The text that greedy decoding gives each row's prompt, in the rows' order, without the end of the turn."""
    bare, device = unwrapped(model), device_of(model)
    ends = end_ids(tokenizer, rows)
    limit = max(len(row.input_ids) - row.prompt_length for row in rows) + ROOM
    batch_size = batch_size if bears_padding(bare) else 1
    order = sorted(range(len(rows)), key=lambda i: -rows[i].prompt_length)
    found: dict[int, str] = {}
    with evaluating(bare):
        caching = keeps_cache(bare)
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            sequences = [prompt_of(rows[i], bare, limit) for i in indices]
            prompts = left_padded(sequences, tokenizer.pad_token_id, device)
            generated = bare.generate(
                input_ids=prompts.input_ids_BT,
                attention_mask=prompts.attention_mask_BT,
                max_new_tokens=limit,
                use_cache=caching,
                eos_token_id=sorted(ends),
                pad_token_id=tokenizer.pad_token_id,
                **PLAIN_GREEDY,
            )
            for i, tokens in zip(indices, generated[:, prompts.input_ids_BT.shape[1] :].tolist(), strict=True):
                length = next((t for t, token in enumerate(tokens) if token in ends), len(tokens))
                found[i] = _text(tokenizer, tokens[:length])
    return [found[i] for i in range(len(rows))]


def end_ids(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> set[int]:
    """The tokens that end a generation: the tokenizer's own, and the last special one of each completion."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = {tokenizer.eos_token_id} - {None}
    for row in rows:
        ends.update([t for t in row.input_ids[row.prompt_length :] if t in special][-1:])
    return ends


def _text(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
