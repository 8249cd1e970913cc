"""New words for a pipeline: a token in the tokenizer and a row in the text encoder, and both taken away
again.

Shapes: a token has k rows (k, dim) per text encoder; k > 1 writes it as ``<name> <name>_1 …`` inside prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SpectralAdapterError

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


class TokenRows:
    """New words in one pipeline, until ``remove`` or the end of a ``with`` block; ``parameters`` are their
    embedding rows.

    The pretrained embedding matrix is never resized or written: a wrapper looks the new ids up in the rows.
    """

    def __init__(
        self, pipe: Any, tokens: Mapping[str, Mapping[str, Tensor]], trainable: bool = False
    ) -> None:
        self.parameters: dict[str, dict[str, nn.Parameter]] = {token: {} for token in tokens}
        self._undo: list[Any] = []
        try:
            for part, attribute in TOKENIZERS.items():
                wanted = {t: rows[part] for t, rows in tokens.items() if part in rows}
                if wanted and getattr(pipe, part, None) is not None:
                    self._add(pipe, part, attribute, wanted, trainable)
        except BaseException:
            self.remove()
            raise

    def _add(
        self, pipe: Any, part: str, attribute: str, wanted: Mapping[str, Tensor], trainable: bool
    ) -> None:
        import copy

        tokenizer = getattr(pipe, attribute)
        encoder = getattr(pipe, part)
        embedding = encoder.get_input_embeddings()
        grown = copy.deepcopy(tokenizer)
        taken = [t for t in wanted if t in grown.get_vocab()]
        if taken:
            raise SpectralAdapterError(
                f"token {taken[0]!r} is already a word of the tokenizer: choose another name"
            )
        rows = {}
        for token, values in wanted.items():
            if values.dim() != 2 or values.shape[1] != embedding.weight.shape[1]:
                raise SpectralAdapterError(
                    f"token {token!r} for {part}: found rows of shape {tuple(values.shape)}, expected "
                    f"(k, {embedding.weight.shape[1]}); it belongs to another text encoder"
                )
            first = len(grown)
            names = [token, *(f"{token}_{i}" for i in range(1, len(values)))]
            grown.add_tokens(names)
            ids = [grown.convert_tokens_to_ids(name) for name in names]
            assert ids == list(range(first, first + len(names)))
            parameter = nn.Parameter(values.detach().clone().float(), requires_grad=trainable)
            self.parameters[token][part] = parameter
            rows[first] = parameter
        original = embedding.forward
        had_own = "forward" in vars(embedding)
        embedding.forward = _lookup(original, embedding, rows)
        self._undo.append(lambda: _restore_forward(embedding, original, had_own))
        self._pool_at_end(encoder, tokenizer)
        setattr(pipe, attribute, grown)
        self._undo.append(lambda: setattr(pipe, attribute, tokenizer))

    def _pool_at_end(self, encoder: nn.Module, tokenizer: Any) -> None:
        """Published CLIP configurations say eos 2, for which transformers pools at the LARGEST id: a new word
        would steal that place. For every other prompt the true id gives the same row."""
        for module in (encoder, getattr(encoder, "text_model", None)):
            if getattr(module, "eos_token_id", None) == 2:
                module.eos_token_id = tokenizer.eos_token_id  # type: ignore[union-attr]
                self._undo.append(lambda m=module: setattr(m, "eos_token_id", 2))

    def values(self) -> dict[str, dict[str, Tensor]]:
        """The rows as they are now: token -> part -> (k, dim)."""
        return {t: {p: v.detach().clone() for p, v in parts.items()} for t, parts in self.parameters.items()}

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> TokenRows:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _restore_forward(embedding: nn.Module, original: Any, had_own: bool) -> None:
    if had_own:
        embedding.forward = original
    else:
        vars(embedding).pop("forward", None)


def _lookup(original: Any, embedding: nn.Module, rows: Mapping[int, nn.Parameter]) -> Any:
    """Embedding lookup that serves ids beyond the matrix from the new rows."""

    def forward(ids: Tensor) -> Tensor:
        first = min(rows)
        known: Tensor = original(torch.where(ids < first, ids, torch.zeros_like(ids)))
        for start, values in rows.items():
            inside = (ids >= start) & (ids < start + len(values))
            picked = values[torch.where(inside, ids - start, torch.zeros_like(ids))]
            known = torch.where(inside[..., None], picked.to(known), known)
        return known

    return forward


def initial_rows(pipe: Any, words: str) -> dict[str, Tensor]:
    """Start values for a new token, part -> (1, dim): the mean embedding of the given words."""
    rows = {}
    for part, attribute in TOKENIZERS.items():
        encoder = getattr(pipe, part, None)
        if encoder is None:
            continue
        ids = getattr(pipe, attribute)(words, add_special_tokens=False).input_ids
        weight = encoder.get_input_embeddings().weight.detach()
        chosen = weight[ids] if ids else weight.mean(0, keepdim=True)
        rows[part] = chosen.float().mean(0, keepdim=True)
    return rows
