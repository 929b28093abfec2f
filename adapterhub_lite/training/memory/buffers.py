"""Named buffers that are made once, grow when they must, and are reused by every pack and step."""

from __future__ import annotations

import torch

_STEP = 64  # rows: what grew by a few of them would leave a hole that nothing fits into
_VIEWS = 8192  # packs differ in their tokens, and a view is quicker found than made


class Buffers:
    """Memory of one computation. What a name gave before is overwritten by who asks for it next."""

    def __init__(self, device: torch.device, dtype: torch.dtype, lean: bool = False) -> None:
        """lean: what is freed is given to the allocator, which finds it again quickly (CUDA)."""
        self.device, self.dtype, self.lean = device, dtype, lean
        self.most = 0  # bytes at once, so far
        self._kept: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._views: dict[tuple[str, int, int, torch.dtype | None], torch.Tensor] = {}

    def __call__(self, name: str, rows: int, columns: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A contiguous [rows, columns], its values undefined."""
        view = self._views.get((name, rows, columns, dtype))
        if view is None:
            if len(self._views) >= _VIEWS:
                self._views.clear()
            view = self._views[name, rows, columns, dtype] = self._view(name, rows, columns, dtype)
        return view

    def _view(self, name: str, rows: int, columns: int, dtype: torch.dtype | None) -> torch.Tensor:
        key = (name, dtype or self.dtype)
        kept = self._kept.get(key)
        if kept is None or kept.numel() < rows * columns:
            self._kept.pop(key, None)
            kept = None
            self._views.clear()  # the old one is free before the new one is made
            room = rows if rows <= _STEP else -(-rows // _STEP) * _STEP
            kept = self._kept[key] = torch.empty(room * columns, device=self.device, dtype=key[1])
            self.most = max(self.most, self.nbytes)
        return kept[: rows * columns].view(rows, columns)

    def free(self, *names: str) -> None:
        """Nothing of these is read again before it is written."""
        if self.lean:
            for key in [key for key in self._kept if key[0] in names]:
                del self._kept[key]
            self._views.clear()

    def clear(self) -> None:
        """Give all of it back."""
        self._kept.clear()
        self._views.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(kept.nbytes for kept in self._kept.values())
