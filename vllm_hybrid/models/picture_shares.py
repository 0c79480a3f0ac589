"""A batch of pictures encoded by several ranks, each of which has the whole tower and encodes its share.

An image merges by itself, so a share's live tokens are those of the whole batch. How many they are differs by
image and is known to nobody before its rank has encoded it. So the owners are exchanged first, which have one
row per patch and say how many live tokens there are, and then the features, in as many rows as the largest
share needs. These two exchanges are all that ranks do together: whatever a rank does to encode its share,
once or again, another does not wait for it with anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vllm_hybrid.method.row_plan import to_device
from vllm_hybrid.method.token_merging import LiveTokens, live_places


@dataclass(frozen=True)
class Ranks:
    """The ranks that share pictures out among themselves.

    Attributes:
        size: how many there are.
        own: the number of this one, from 0.
        gather: called by all of them with floating-point tensors of one shape [...] and dtype, it gives each
            [size, ...], in the order of the ranks.

    """

    size: int
    own: int
    gather: Callable[[torch.Tensor], torch.Tensor]

    def shares(self, images: int) -> list[slice]:
        """The images that each rank encodes: neighbours, as many as elsewhere or one more."""
        fewest, more = divmod(images, self.size)
        starts = [rank * fewest + min(rank, more) for rank in range(self.size + 1)]
        return [slice(first, end) for first, end in zip(starts, starts[1:], strict=False)]


def share_out(
    encode: Callable[[slice], LiveTokens], images: int, nothing: LiveTokens, ranks: Ranks
) -> LiveTokens:
    """Encode a batch together; every rank calls this with the same batch.

    Args:
        encode: encodes some of the images, at least one.
        images: how many the batch has, at least one.
        nothing: the live tokens of no image, :func:`no_tokens`; what a rank without a share has.
        ranks: who encodes.

    Returns:
        The live tokens of all images, the same to the last bit on every rank. On a device the host waits
        once, beside what ``encode`` waits for.

    """
    shares = ranks.shares(images)
    own = shares[ranks.own]
    live = nothing if own.start == own.stop else encode(own)
    # vLLM's exchange through shared memory takes no whole numbers; float32 holds these exactly.
    owner = _exchange(live.owner.float(), [share.stop - share.start for share in shares], ranks).long()
    # Every live token owns a patch, so the last one's number says how many there are.
    counts = (owner.amax(dim=1) + 1).tolist()
    features = _exchange(live.features, [sum(counts[share]) for share in shares], ranks)
    _, image, index = live_places(to_device(counts, owner.device), sum(counts))
    return LiveTokens(features, image, index, owner, counts)


def no_tokens(patches: int, token: torch.Tensor) -> LiveTokens:
    """The live tokens of no image, where one of the tower's is like ``token``, [C], in dtype and device."""
    places = torch.empty(0, dtype=torch.int64, device=token.device)
    features = token.new_empty(0, token.shape[0])
    return LiveTokens(features, places, places, places.new_empty(0, patches), [])


def _exchange(part: torch.Tensor, lengths: Sequence[int], ranks: Ranks) -> torch.Tensor:
    """Parts [lengths[rank], C] of all ranks, one behind the other; each gives its own."""
    padded = F.pad(part, (0, 0, 0, max(lengths) - part.shape[0]))
    return torch.cat([whole[:length] for whole, length in zip(ranks.gather(padded), lengths, strict=True)])
