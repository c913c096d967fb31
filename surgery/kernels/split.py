"""The exact split: a weight becomes k weights of its own dtype whose sum is that weight.

In binary, w / k is exact only for powers of two, and in float16 not even w / 2 at the subnormal
end. Two rules give shares that always add up (METHODS: Adila et al., arXiv 2603.08647, take
w / 2 and leave the rest to rounding):

- dyadic shares: for k copies 2^-a and 2^-(a+1) in such numbers that they sum to 1 (3 copies:
  1/2, 1/4, 1/4). Where the smallest share of w can be represented, all can, and that is it.
- otherwise with u = ulp(w): any a that is a multiple of u with 0 <= a/w <= 1 leaves w - a
  representable too. So the shares are rounded to multiples of u, and the last takes the rest.

The second rule also splits unequally, which breaks the symmetry between the copies: with equal
shares they would get equal gradients for ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from surgery.kernels.bits import same_bits
from surgery.on_demand import torch


@cache
def dyadic_shares(copies: int) -> tuple[float, ...]:
    """`copies` powers of two that sum to 1, as equal as can be, the largest first."""
    whole = 1 << (copies.bit_length() - 1)  # the largest power of two that isn't above copies
    halved = copies - whole
    return (1 / whole,) * (whole - halved) + (0.5 / whole,) * (2 * halved)


@dataclass(frozen=True, eq=False)
class Dyadic:
    """The dyadic split of columns, worked out once for a tensor: copies lie in `runs` of source
    columns (start, stop), `fractions` (p',) are their shares and `smallest` (p,) the smallest
    share of each source, both in the weights' dtype. Columns behind the runs are zero."""

    runs: tuple[tuple[int, int], ...]
    fractions: torch.Tensor
    smallest: torch.Tensor

    @classmethod
    def plan(
        cls,
        runs: tuple[tuple[int, int], ...],
        ordinals: torch.Tensor,
        copies: torch.Tensor,
        width: int,
        dtype: torch.dtype,
    ) -> Dyadic:
        """From what `split_columns` is given; `width` is p."""
        shares = [
            dyadic_shares(k)[m] if k else 0.0
            for m, k in zip(ordinals.tolist(), copies.tolist(), strict=True)
        ]
        smallest = [dyadic_shares(k)[-1] for k in copies[:width].tolist()]
        return cls(runs, torch.tensor(shares, dtype=dtype), torch.tensor(smallest, dtype=dtype))

    def split(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The columns, each with its share; None where a share of one can't be represented: a
        power of two times w is exact just where its inverse gives w back."""
        if not same_bits((weight * self.smallest).div_(self.smallest), weight):
            return None
        out = torch.empty(weight.shape[0], len(self.fractions), dtype=weight.dtype)
        at = 0
        for start, stop in self.runs:
            end = at + stop - start
            torch.mul(weight[:, start:stop], self.fractions[at:end], out=out[:, at:end])
            at = end
        out[:, at:] = 0
        return out


def split_columns(
    weight: torch.Tensor,
    *noise: torch.Tensor,
    sources: torch.Tensor,
    ordinals: torch.Tensor,
    copies: torch.Tensor,
    symmetry_break: float = 0.0,
    dyadic: Dyadic | None = None,
) -> torch.Tensor:
    """Columns `sources` of `weight` (rows, p), each with its share: shape (rows, p').

    Column j is number `ordinals[j]` of the `copies[j]` copies of column `sources[j]`; where
    `copies[j]` is 0, the column is zero. `noise` is as for `share`, shape (rows, p) each.
    `dyadic` is the same, prepared for the usual case, in which it is all there is to do.
    """
    if dyadic is not None and (split := dyadic.split(weight)) is not None:
        return split
    wide = weight.index_select(1, sources)
    wide_noise = tuple(e.index_select(1, sources) for e in noise)
    return share(wide, ordinals[None], copies[None], *wide_noise, symmetry_break=symmetry_break)


def split_rows(
    weight: torch.Tensor,
    ordinals: torch.Tensor,
    copies: torch.Tensor,
    *noise: torch.Tensor,
    symmetry_break: float = 0.0,
) -> torch.Tensor:
    """The same along rows: `weight` (rows, n) holds the source row of every row already."""
    return share(weight, ordinals[:, None], copies[:, None], *noise, symmetry_break=symmetry_break)


def divide(weight: torch.Tensor, *, times: int) -> torch.Tensor:
    """A `times`-th of every weight, a power of two: exact short of underflow."""
    return weight * (1 / times)


def share(
    weight: torch.Tensor,
    ordinals: torch.Tensor,
    copies: torch.Tensor,
    *noise: torch.Tensor,
    symmetry_break: float = 0.0,
) -> torch.Tensor:
    """Share number `ordinals` of the `copies` shares into which each weight is split, exactly.

    `ordinals` and `copies` are int64 and broadcast against `weight`. `noise[m]` is uniform in
    [-1, 1): share m is its dyadic share s times (1 + 2 * symmetry_break * noise[m]), so that of
    two copies the first gets 1/2 + e with |e| < symmetry_break; the last takes the rest.
    """
    most = int(copies.max()) if copies.numel() else 0
    table = torch.zeros(most + 1, max(most, 1), dtype=torch.float64)
    for k in range(1, most + 1):
        table[k, :k] = torch.tensor(dyadic_shares(k), dtype=torch.float64)
    fractions = table[copies, ordinals].to(torch.float32)
    if not symmetry_break:
        smallest = table[copies, (copies - 1).clamp_(min=0)].to(torch.float32)
        if _exact(weight, smallest):
            return _times(weight, fractions)
        fits = _fits(weight, smallest)
    exact = _share_by_ulp(weight, ordinals, copies, table, noise, symmetry_break)
    return exact if symmetry_break else torch.where(fits, _times(weight, fractions), exact)


def _times(weight: torch.Tensor, fractions: torch.Tensor) -> torch.Tensor:
    """weight * fractions, rounded once to weight's dtype: exact where `_fits` says so."""
    if weight.dtype == torch.float64:
        return weight * fractions.to(torch.float64)
    return (weight.to(torch.float32) * fractions).to(weight.dtype)


def _fits(weight: torch.Tensor, smallest: torch.Tensor) -> torch.Tensor:
    """Where weight * smallest is representable: a power of two only loses bits to underflow, and
    then doesn't come back. Without copies there is no share, and nothing to lose."""
    small = _times(weight, smallest).to(torch.float64)
    back = small / torch.where(smallest > 0, smallest, 1).to(torch.float64)
    return (back == weight.to(torch.float64)) | (smallest == 0)


def _exact(weight: torch.Tensor, smallest: torch.Tensor) -> bool:
    """Whether every weight * smallest is representable, the cheap way: none is near underflow."""
    least = float(smallest[smallest > 0].min()) if bool((smallest > 0).any()) else 1.0
    limit = torch.finfo(weight.dtype).tiny / least
    magnitude = weight.abs()
    return not bool(((magnitude < limit) & (magnitude > 0)).any())


def _share_by_ulp(
    weight: torch.Tensor,
    ordinals: torch.Tensor,
    copies: torch.Tensor,
    table: torch.Tensor,
    noise: tuple[torch.Tensor, ...],
    symmetry_break: float,
) -> torch.Tensor:
    """Shares that are multiples of ulp(weight), the last taking the rest; float64 throughout."""
    wide = weight.to(torch.float64)
    unit = _ulp(weight)
    size = wide.abs()
    left = size.clone()
    out = torch.zeros_like(wide)
    for m in range(table.shape[1]):
        wanted = size * table[copies, torch.full_like(copies, m)]
        if symmetry_break and m < len(noise):
            wanted = wanted * (1 + 2 * symmetry_break * noise[m].to(torch.float64))
        part = torch.minimum(torch.round(wanted / unit) * unit, left)
        part = torch.where(copies == m + 1, left, part)
        part = torch.where(copies > m, part, torch.zeros_like(part))
        out = torch.where(ordinals == m, part, out)
        left = left - part
    return torch.copysign(out, wide).to(weight.dtype)


def _ulp(weight: torch.Tensor) -> torch.Tensor:
    """The unit in the last place of every weight, in float64 (that of the smallest for zero)."""
    info = torch.finfo(weight.dtype)
    mantissa, exponent = torch.frexp(weight.to(torch.float64))
    unit = torch.ldexp(torch.full_like(mantissa, info.eps / 2), exponent)
    return unit.clamp_(min=info.tiny * info.eps)
