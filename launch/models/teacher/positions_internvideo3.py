"""What follows from token ids and grids: the positions of M-RoPE, and which row has which pixels."""

from collections.abc import Iterator

import torch

from .configuration_internvideo3 import InternVideo3Config


def text_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """(B, T): real tokens count from 0, padding stands at 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def mrope_positions(
    config: InternVideo3Config,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    image_grid_thw: torch.Tensor | None,
    video_grid_thw: torch.Tensor | None,
) -> torch.Tensor:
    """(3, B, T) positions of whole prompts: time, height and width.

    Text counts up equally on all three axes. Each temporal patch is a grid of its own: one time index,
    heights and widths from the position it starts at; what follows starts after the largest.

    Raises:
        ValueError: the grids are not those of the text.
    """
    merge = config.vision_config.spatial_merge_size
    grids = {
        config.image_token_id: _sides(image_grid_thw, merge),
        config.video_token_id: _sides(video_grid_thw, merge),
    }
    positions = torch.zeros((3, *input_ids.shape), dtype=torch.long)
    for row, (ids, real) in enumerate(zip(input_ids.cpu(), attention_mask.bool().cpu(), strict=True)):
        positions[:, row, real] = _row_positions(ids[real], grids)
    if any(next(left, None) is not None for left in grids.values()):
        raise ValueError("there are more images or videos than the text has vision tokens for")
    return positions.to(input_ids.device)


def _sides(grid_thw: torch.Tensor | None, merge: int) -> Iterator[tuple[int, int]]:
    """Height and width in vision tokens of every temporal patch."""
    for t, h, w in [] if grid_thw is None else grid_thw.tolist():
        yield from [(h // merge, w // merge)] * t


def _row_positions(ids: torch.Tensor, grids: dict[int, Iterator[tuple[int, int]]]) -> torch.Tensor:
    advance, offsets = torch.ones_like(ids), torch.zeros((3, len(ids)), dtype=torch.long)
    visual = torch.isin(ids, torch.tensor(list(grids))).nonzero().flatten().tolist()
    done = 0
    while done < len(visual):
        first = visual[done]
        kind = int(ids[first])
        sides = next(grids[kind], None)
        if sides is None:
            raise ValueError("the text has more vision tokens than the images and videos given make")
        height, width = sides
        size = height * width
        if not (len(ids) >= first + size and bool((ids[first : first + size] == kind).all())):
            raise ValueError(f"a grid of {height}x{width} vision tokens does not fit the text at {first}")
        # The whole grid moves the position once, at its last token.
        advance[first : first + size] = 0
        advance[first + size - 1] = max(height, width)
        offsets[1, first : first + size] = torch.arange(height).repeat_interleave(width)
        offsets[2, first : first + size] = torch.arange(width).repeat(height)
        done += size
    return advance.cumsum(0) - advance + offsets


def repeated(
    pixels: torch.Tensor, grid_thw: torch.Tensor, patches: torch.Tensor, times: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and grids with those of every row `times` times in turn; `patches` (B,) are each row's."""
    ends = patches.cumsum(0)
    last = torch.searchsorted(grid_thw.prod(-1).cumsum(0), ends, right=True)

    def rows(value: torch.Tensor, cuts: torch.Tensor) -> torch.Tensor:
        parts = torch.tensor_split(value, cuts[:-1].cpu())
        return torch.cat([part for part in parts for _ in range(times)])

    return rows(pixels, ends), rows(grid_thw, last)
