"""The decoder's own lesson: half way up, every token that knows what is asked about knows where it is.

Answers alone teach this late: until a question's words find their thing in the picture, any thing of the
picture is as good a guess, and nothing says which words to compare with what.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from vllm_hybrid.demo.model import SHAPE
from vllm_hybrid.demo.scenes import PLACES


class Finder(nn.Module):
    """A linear reader of the residual stream; it is training's alone and not part of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(SHAPE.width)
        self.cells = nn.Linear(SHAPE.width, len(PLACES))

    def forward(self, halfway: Tensor, cells: Tensor) -> tuple[Tensor, float]:
        """The loss and the share of tokens that know all their cells.

        Args:
            halfway: the residual stream of tokens that know what is asked about [tokens, width].
            cells: whether a thing that is asked about is there, float32 [tokens, cells].

        """
        read = self.cells(self.norm(halfway))
        right = ((read > 0) == (cells > 0)).all(-1).float().mean()
        return functional.binary_cross_entropy_with_logits(read, cells), float(right)
