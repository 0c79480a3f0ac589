"""DToMe: dynamic token merging, packed over the images of a batch (DyMU, arXiv 2504.17040, section 3.1).

Every image keeps its own number of tokens; they lie one image after the other, class token first. The
work is done on a padded view [images, longest, ...]; no loop runs over images. The tower's attention
uses the same view.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# All but cuDNN's, torch's first choice on the newest GPUs: it builds a plan for every new shape, and the
# longest image of a batch is as long as no other after each merge.
_SDPA_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Layout:
    """How packed tokens and the padded view belong together; made once after each merge.

    Attributes:
        lengths: tokens per image, on the host.
        place: int64 [T], index of each packed token in the flattened padded view; None where all images
            are equally long, so that both are the same memory.

    """

    lengths: tuple[int, ...]
    place: torch.Tensor | None

    @classmethod
    def of(cls, lengths: torch.Tensor) -> Layout:
        """The layout of int64 [images] tokens per image; reads them from the device once."""
        on_host = tuple(lengths.tolist())
        longest, total = max(on_host, default=0), sum(on_host)
        if total == longest * len(on_host):
            return cls(on_host, None)
        image = torch.arange(len(on_host), device=lengths.device)
        # Token t of an image starting at s stands at image * longest + t - s.
        shift = image * longest - (lengths.cumsum(0) - lengths)
        place = torch.arange(total, device=lengths.device)
        return cls(on_host, place + shift.repeat_interleave(lengths, output_size=total))

    @property
    def longest(self) -> int:
        """Tokens of the longest image, the padded view's length."""
        return max(self.lengths, default=0)

    @property
    def total(self) -> int:
        """Tokens of all images."""
        return sum(self.lengths)


@dataclass
class PackedTokens:
    """Tokens of several images at one layer of the tower.

    Attributes:
        hidden: [T, C], tokens of all images, each image's class token first.
        size: float32 [T], patches a token stands for; 1 for class tokens.
        lengths: int64 [images], tokens per image, class token included.
        owner: int64 [images, P], number (0 .. n - 1, class token not counted) of the live token that
            holds each patch.
        layout: follows from lengths.

    """

    hidden: torch.Tensor
    size: torch.Tensor
    lengths: torch.Tensor
    owner: torch.Tensor
    layout: Layout = field(default=None, repr=False)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.layout is None:
            self.layout = Layout.of(self.lengths)

    @classmethod
    def start(cls, hidden: torch.Tensor) -> PackedTokens:
        """Unmerged tokens [images, 1 + P, C]."""
        images, length, _ = hidden.shape
        device = hidden.device
        return cls(
            hidden=hidden.flatten(0, 1),
            size=torch.ones(images * length, device=device),
            lengths=torch.full((images,), length, device=device),
            owner=torch.arange(length - 1, device=device).repeat(images, 1),
            layout=Layout((length,) * images, None),
        )

    @property
    def unmerged(self) -> bool:
        """Whether every token stands for one patch; known without asking the device."""
        return self.layout.total == len(self.layout.lengths) * (self.owner.shape[1] + 1)


def pad(packed: torch.Tensor, tokens: PackedTokens) -> torch.Tensor:
    """[T, ...] to [images, longest, ...], zeros behind short images; a view where all are equally long."""
    layout = tokens.layout
    shape = (len(layout.lengths), layout.longest)
    if layout.place is None:
        return packed.unflatten(0, shape)
    padded = packed.new_zeros(shape[0] * shape[1], *packed.shape[1:])
    return padded.index_copy_(0, layout.place, packed).unflatten(0, shape)


def unpad(padded: torch.Tensor, tokens: PackedTokens) -> torch.Tensor:
    """The inverse of :func:`pad`."""
    place = tokens.layout.place
    return padded.flatten(0, 1) if place is None else padded.flatten(0, 1).index_select(0, place)


def log_size_bias(tokens: PackedTokens) -> torch.Tensor | None:
    """What proportional attention adds to the key logits (ToMe, arXiv 2210.09461, section 3.2).

    Returns:
        float32 [images, 1, 1, longest], log(size), -inf at padding; None while nothing has merged, where
        all of it would be 0.

    """
    return None if tokens.unmerged else pad(tokens.size, tokens).log()[:, None, None, :]


def proportional_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tokens: PackedTokens, scale: float
) -> torch.Tensor:
    """Attention inside every image over the padded view, keys weighed by their tokens' sizes.

    Args:
        query: [T, heads, head_size], packed like ``tokens.hidden``; keys and values alike.
        key: see query.
        value: see query.
        tokens: the images' tokens; their sizes weigh the keys.
        scale: factor on the logits.

    Returns:
        [T, heads, head_size].

    """
    bias = log_size_bias(tokens)
    mask = None if bias is None else bias.to(query.dtype)
    query, key, value = (pad(x, tokens).transpose(1, 2) for x in (query, key, value))
    with sdpa_kernel(_SDPA_KERNELS):
        attended = F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    return unpad(attended.transpose(1, 2), tokens)


def live_rows(tokens: PackedTokens) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the tokens other than class tokens are: what LLaVA's feature strategy "default" hands on.

    Returns:
        int64 [live] each: row in ``tokens.hidden``, image, number inside the image (0 .. n - 1).

    """
    return live_places(tokens.lengths - 1, tokens.layout.total - len(tokens.layout.lengths))


def live_places(live: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`live_rows`, of images packed without gaps.

    Args:
        live: int [images], tokens of each image but for its class token.
        total: how many they are, on the host.

    """
    image = torch.arange(live.shape[0], device=live.device).repeat_interleave(live, output_size=total)
    number = torch.arange(total, device=live.device)
    return number + image + 1, image, number - (live.cumsum(0) - live)[image]


@dataclass
class LiveTokens:
    """The live tokens of several images at the tower's feature layer, class tokens left out.

    Attributes:
        features: [live, C], one image after the other.
        image: int64 [live], the image of each.
        index: int64 [live], its number inside the image, 0 .. n - 1.
        owner: int64 [images, P], the live token that holds each patch.
        counts: live tokens of each image, on the host.

    """

    features: torch.Tensor
    image: torch.Tensor
    index: torch.Tensor
    owner: torch.Tensor
    counts: list[int]

    @classmethod
    def of(cls, tokens: PackedTokens) -> LiveTokens:
        """Those of packed tokens; the host does not wait for the device."""
        row, image, index = live_rows(tokens)
        counts = [length - 1 for length in tokens.layout.lengths]
        return cls(tokens.hidden[row], image, index, tokens.owner, counts)


def merge(tokens: PackedTokens, metric: torch.Tensor, threshold: float | torch.Tensor | None) -> PackedTokens:
    """Merge similar tokens inside each image (DyMU section 3.1, on ToMe's bipartite matching, section 3).

    Tokens at even index (A) merge into their most similar token at odd index (B), the earlier of equals,
    where the cosine is strictly above the threshold. The class token, index 0, never does. So at most
    (T - 1) // 2 of an image's T tokens can merge: the cap of one layer needs no ranking. An image in
    which nothing merges stays as it is, whatever the others of the batch do. Runs agree to the bit:
    nothing is summed in racing order. The host waits for the device once, to learn the new lengths.

    Args:
        tokens: the tokens.
        metric: [T, D], keys averaged over heads; normalised here.
        threshold: least cosine, exclusive; None or infinity merges nothing and costs nothing. Or float32
            [images], one for each image.

    Returns:
        The merged tokens: of each image that merges the unmerged A tokens in index order, then the B
        tokens.

    """
    if isinstance(threshold, torch.Tensor):
        threshold = threshold[:, None]
    elif threshold is None or threshold == math.inf:
        return tokens
    best, into = match(tokens, metric)
    return join(tokens, best > threshold, into)


def match(tokens: PackedTokens, metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each A token's most similar B token of its image.

    Args:
        tokens: the tokens.
        metric: [T, D], keys averaged over heads; normalised here.

    Returns:
        float32 and int64 [images, A], A = ceil(longest / 2): the best cosine, -inf for the class token
        and at padding, and the B token (0 for index 1, 1 for index 3, ...) that it belongs to.

    """
    unit = F.normalize(pad(metric.float(), tokens), dim=-1)
    scores = unit[:, 0::2] @ unit[:, 1::2].transpose(1, 2)
    if tokens.layout.place is not None:
        inside = torch.arange(tokens.layout.longest, device=scores.device) < tokens.lengths[:, None]
        scores.masked_fill_(~inside[:, None, 1::2], -math.inf)
        best, into = scores.max(dim=-1)
        best.masked_fill_(~inside[:, 0::2], -math.inf)
    else:
        best, into = scores.max(dim=-1)
    best[:, 0] = -math.inf
    return best, into


def join(tokens: PackedTokens, merges: torch.Tensor, into: torch.Tensor) -> PackedTokens:
    """Carry merges out: size-weighted mean features in float32, sizes added, patches joined.

    Args:
        tokens: the tokens.
        merges: bool [images, A], which A tokens merge; neither class tokens nor padding.
        into: int64 [images, A], the B token each would merge into.

    Returns:
        The merged tokens; `tokens` itself where no image merges. Tokens that receive nothing keep their
        features to the bit.

    """
    device = merges.device
    lengths = tokens.lengths - merges.sum(dim=1)
    layout = Layout.of(lengths)
    if layout.total == tokens.layout.total:
        return tokens
    new_index = _new_index(tokens.lengths, tokens.layout.longest, merges, into)
    target = unpad(new_index + (lengths.cumsum(0) - lengths)[:, None], tokens)
    # Sizes and counts are whole numbers, so their float sums are exact in any order.
    size = torch.zeros(layout.total, device=device).index_add_(0, target, tokens.size)
    members = torch.zeros(layout.total, dtype=torch.int64, device=device)
    members.index_add_(0, target, torch.ones_like(target))
    # embedding_bag adds up weighted rows by segment, in order, in one pass over the features.
    order = target.argsort(stable=True)
    hidden = F.embedding_bag(
        order,
        tokens.hidden.float(),
        offsets=members.cumsum(0) - members,
        mode="sum",
        per_sample_weights=(tokens.size / size[target])[order],
    )
    owner = new_index.gather(1, tokens.owner + 1) - 1
    return PackedTokens(hidden.to(tokens.hidden.dtype), size, lengths, owner, layout)


def _new_index(lengths: torch.Tensor, longest: int, merges: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """int64 [images, longest]: index after the merge, class token at 0; arbitrary at padding."""
    merged = merges.sum(dim=1, keepdim=True)
    unchanged = torch.arange(longest, device=merges.device)
    # Unmerged A tokens close ranks; B tokens follow, and A tokens that merge take their B token's place.
    index_a = (~merges).cumsum(1) - 1
    first_b = (lengths[:, None] + 1) // 2 - merged
    index = torch.empty(merges.shape[0], longest, dtype=torch.int64, device=merges.device)
    index[:, 1::2] = first_b + unchanged[: longest // 2]
    index[:, 0::2] = torch.where(merges, first_b + into, index_a)
    return torch.where(merged > 0, index, unchanged)
