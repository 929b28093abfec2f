"""Which numbers dropout keeps, as a pure function of where they are: no generator, no state, nothing to store.

A mask depends on the row's key, the place in the model, the token within the row and the column. So a row is dropped
alike in whatever pack it stands, beside whichever other learners, and again in the backward and after a resumption.
The hash is the `lowbias32` finaliser (Wellons, "Prospecting for hash functions", 2018), once over what names a token
and once more for each column; `kernels` has the same in C.
"""

from __future__ import annotations

import torch

_WORD = 0xFFFFFFFF
_KEY, _SALT, _TOKEN, _COLUMN = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F
_BITS = 24


def threshold(p: float) -> int:
    """A number is dropped where the upper 24 bits of its hash are below this."""
    return round(p * (1 << _BITS))


def token_words(keys: torch.Tensor, tokens: torch.Tensor, salt: int) -> torch.Tensor:
    """The 32-bit word that names each token in one place of the model, as int64 [tokens]."""
    folded = (keys & _WORD) ^ ((((keys >> 32) & _WORD) * _KEY) & _WORD)
    place = _mix(folded ^ ((salt * _SALT) & _WORD))
    return _mix(place ^ ((tokens * _TOKEN) & _WORD))


def keep_mask(keys: torch.Tensor, tokens: torch.Tensor, salt: int, columns: int, p: float) -> torch.Tensor:
    """What is kept, bool [tokens, columns]; the caller scales by 1 / (1 - p).

    Args:
        keys: [tokens] int64, the key of each token's row.
        tokens: [tokens] int64, index within the row.
        salt: index of the place in the model.
    """
    words = token_words(keys, tokens, salt)
    steps = (torch.arange(columns, device=keys.device) * _COLUMN) & _WORD
    return (_mix(words[:, None] ^ steps) >> (32 - _BITS)) >= threshold(p)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)
