"""Binary masks to another size, component by component: nothing disappears.

    resized = resize_components(mask, (x0, y0, x1, y1), 256)

Interpolating and thresholding at one half erases what is thinner than half a result pixel. Here
each 8-connected component keeps its area, at least one pixel. The trade-off: it costs more than an
interpolation. `biascare.data.transforms.apply_mask` is the way in.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Array = NDArray[Any]

EIGHT_CONNECTED = np.ones((3, 3), bool)
_NEGLIGIBLE = 1e-6  # coverage below it is rounding error of the overlap sums
_RUN = 16  # cells of an edge that are chosen together where all are covered alike
_CHUNK = 2**20  # pixels looked at together; bounds the memory for very large masks


class _Axis(NamedTuple):
    """Overlap of n result cells with the pixels along one axis: a banded matrix as its bands."""

    first: int  # number of the first of these cells in the result
    pixels: NDArray[np.intp]  # [n, w] pixels of the window of each cell
    weights: NDArray[np.float64]  # [n, w] share of the cell that each of them covers

    @property
    def densest(self) -> NDArray[np.intp]:
        """[n] the pixel that covers most of each cell."""
        return self.pixels[np.arange(len(self.pixels)), self.weights.argmax(axis=1)]

    def average(self, values: Array) -> NDArray[np.float64]:
        """[pixels, m] -> [n, m] mean of the values over each cell: the matrix product."""
        # Band by band: a dense matrix of 256 cells and thousands of pixels is almost all zeros.
        averaged = self.weights[:, :1] * values[self.pixels[:, 0]]
        for band in range(1, self.pixels.shape[1]):
            averaged += self.weights[:, band, None] * values[self.pixels[:, band]]
        return averaged


class _RimCells(NamedTuple):
    """The n pairs (cell, component) where a component covers part of a cell, sorted by cell.

    Cells are numbered in a grid with a margin of one, so that neighbours are plain offsets.
    """

    cells: NDArray[np.int64]  # [n]
    components: NDArray[np.int64]  # [n] from 1
    covered: NDArray[np.float64]  # [n] share of the cell


def _axis(start: float, stop: float, size: int, filled: slice) -> _Axis:
    """Those of the `size` cells dividing start .. stop, in edges of pixels, that overlap `filled`.

    Pixels are numbered from the start of `filled`; those outside it weigh nothing.
    """
    step = (stop - start) / size
    # At least one cell, also for a target of which the crop shows nothing.
    first = min(max(math.floor((filled.start - start) / step), 0), size - 1)
    last = min(max(math.ceil((filled.stop - start) / step), first + 1), size)
    edges = start - filled.start + step * np.arange(first, last + 1)
    num_pixels = filled.stop - filled.start
    lowest = np.floor(edges[:-1])
    window = min(int((np.ceil(edges[1:]) - lowest).max()), num_pixels)
    # Windows of one width make a rectangle of numbers; where a window is pushed inside, the pixels
    # that it gains do not overlap the cell and weigh nothing.
    lowest = np.minimum(np.maximum(lowest, 0), num_pixels - window)
    pixels = lowest[:, None] + np.arange(window)
    overlap = np.minimum(pixels + 1, edges[1:, None]) - np.maximum(pixels, edges[:-1, None])
    return _Axis(first, pixels.astype(np.intp), np.maximum(overlap, 0) / step)


def filled_box(mask: Array) -> tuple[slice, slice]:
    """Rows and columns from the first to the last filled one: most targets fill a small part of
    their image, and only that part needs work. One pixel if the mask is empty."""
    rows, columns = (np.flatnonzero(np.any(mask, axis=axis)) for axis in (1, 0))
    if not len(rows):
        return slice(0, 1), slice(0, 1)
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def resize_components(
    mask: NDArray[np.bool_], box: tuple[float, float, float, float], size: int
) -> NDArray[np.uint8]:
    """[H, W] -> [S, S] in {0, 1} of the crop `box` (edges x0, y0, x1, y1 in pixels of the mask).

    Cells full of mask, and of the others the densest.
    """
    x0, y0, x1, y1 = box
    left, top = math.floor(x0), math.floor(y0)
    inside = mask[top : math.ceil(y1), left : math.ceil(x1)]
    filled = filled_box(inside)
    rows = _axis(y0 - top, y1 - top, size, filled[0])
    columns = _axis(x0 - left, x1 - left, size, filled[1])
    # Transposed: masks come from run lengths, column by column.
    turned = inside[filled].T
    labels, num_components = ndimage.label(turned, EIGHT_CONNECTED)
    covered = rows.average(columns.average(turned).T)
    origin = rows.first, columns.first
    # Most targets are one piece, and then the share of a cell is the component's own.
    if num_components <= 1:
        resized_part = _densest(covered, origin)
    else:
        resized_part = _densest_of_each(covered, labels.T, rows, columns)
    resized = np.zeros((size, size), np.uint8)
    bottom, right = origin[0] + resized_part.shape[0], origin[1] + resized_part.shape[1]
    resized[origin[0] : bottom, origin[1] : right] = resized_part
    return resized


def _densest(covered: NDArray[np.float64], origin: tuple[int, int]) -> NDArray[np.bool_]:
    """bool [n, m]: the cells that one component gets, of those it covers to these shares.

    All full ones, and of the others the densest, so that it has max(1, round(area)); `_order` says
    which are that. `origin` is the row and column of the first cell in the result.
    """
    chosen = covered > 1 - _NEGLIGIBLE
    # Chosen by number and not by a threshold of one half, which erases a lesion of less than half
    # a cell and every line thinner than that.
    missing = int(_num_cells(covered.sum())) - np.count_nonzero(chosen)
    row, column = np.nonzero((covered > _NEGLIGIBLE) & ~chosen)
    if missing > 0 and len(row):
        # A margin of zeros, so that a cell at the edge has eight neighbours like any other.
        width = covered.shape[1] + 2
        padded = np.zeros((covered.shape[0] + 2, width))
        padded[1:-1, 1:-1] = covered
        near = ((row + 1) * width + column + 1)[:, None] + _around(width)
        largest = padded.ravel()[near].max(axis=1)
        cell = row + origin[0], column + origin[1]
        densest = _order(covered[row, column], largest, cell)[:missing]
        chosen[row[densest], column[densest]] = True
    return chosen


def _around(width: int) -> NDArray[np.int64]:
    """[9] steps to a cell and its eight neighbours in a raveled grid of this width."""
    return (np.arange(-1, 2)[:, None] * width + np.arange(-1, 2)).ravel()


def _num_cells(area: Any) -> Any:
    """Cells that components of these areas, in cells, get: the nearest number, at least one."""
    # Halves round up, also one that rounding errors left just below.
    return np.maximum(np.floor(area + 0.5 + _NEGLIGIBLE), 1)


def _order(
    covered: NDArray[np.float64],
    largest: NDArray[np.float64],
    cell: tuple[Array, Array],
    component: Array | None = None,
) -> NDArray[np.intp]:
    """[n] the densest cells first, within each component.

    A component prefers cells by their share `covered` relative to the `largest` among the eight
    neighbours, in eight levels: at the rim of a compact shape, where a neighbour is full, this is
    the order of the shares themselves, while along a thin line every cell of its crest ranks alike.
    Equal ranks follow a two-dimensional low-discrepancy sequence of the `cell`s, rows and columns
    of the result: a line thinner than a cell becomes evenly dotted instead of losing one end. At
    the rim of a compact shape it runs over squares of `_RUN` cells, so that a straight edge gets a
    step or two instead of teeth.
    """
    level = np.floor(8 * covered / largest + 0.5 + _NEGLIGIBLE)
    run = np.where(largest > 1 - _NEGLIGIBLE, _RUN, 1)  # a neighbour is full
    row, column = cell[0] // run, cell[1] // run
    # Steps of the plastic number: the two-dimensional counterpart of the golden ratio.
    spread = (0.7548776662 * (row + 1) + 0.5698402910 * (column + 1)) % 1
    # Row and column at the end, so that the order is complete and equal on every machine.
    keys = cell[1], cell[0], spread, -level
    return np.lexsort(keys if component is None else (*keys, component))


def _densest_of_each(
    covered: NDArray[np.float64], labels: NDArray[np.int32], rows: _Axis, columns: _Axis
) -> NDArray[np.bool_]:
    """`_densest` of every component at once, on the rim cells only: bool [n, m].

    The cost does not grow with their number.
    """
    full = covered > 1 - _NEGLIGIBLE
    # Adjacent pixels share a component, so the component of a full cell is that of any pixel in it.
    full_component = np.where(full, labels[np.ix_(rows.densest, columns.densest)], 0)
    full_component = np.pad(full_component, 1)
    rim = _rim_cells(labels, rows, columns, (covered > _NEGLIGIBLE) & ~full)
    chosen = full_component > 0
    chosen.ravel()[_densest_cells(rim, full_component, (rows.first, columns.first))] = True
    return chosen[1:-1, 1:-1]


def _rim_cells(
    labels: NDArray[np.int32], rows: _Axis, columns: _Axis, partial: NDArray[np.bool_]
) -> _RimCells:
    """How much of each cell in `partial` [S, S] each component covers."""
    cell_rows, cell_columns = np.nonzero(partial)
    num_labels = int(labels.max()) + 1
    window = rows.pixels.shape[1] * columns.pixels.shape[1]
    keys, covered = [], []
    for start in range(0, len(cell_rows), max(1, _CHUNK // window)):
        chunk = slice(start, start + max(1, _CHUNK // window))
        row, column = cell_rows[chunk], cell_columns[chunk]
        found = labels[rows.pixels[row][:, :, None], columns.pixels[column][:, None, :]]
        weight = rows.weights[row][:, :, None] * columns.weights[column][:, None, :]
        cell = ((row + 1) * (partial.shape[1] + 2) + column + 1)[:, None, None]
        used = (found > 0) & (weight > 0)
        key, inverse = np.unique((cell * num_labels + found)[used], return_inverse=True)
        keys.append(key)
        covered.append(np.bincount(inverse, weight[used], len(key)))
    # The empty one stands for no rim at all: components of full cells alone.
    key = np.concatenate([*keys, np.empty(0, np.int64)])
    return _RimCells(
        cells=key // num_labels,
        components=key % num_labels,
        covered=np.concatenate([*covered, np.empty(0)]),
    )


def _densest_cells(
    rim: _RimCells, full_component: NDArray[np.int32], origin: tuple[int, int]
) -> NDArray[np.int64]:
    """The rim cells each component gets besides its full ones; `origin` as in `_densest`."""
    # Full and partial cells are counted apart: a component may have only one of the two kinds.
    num_full = np.bincount(full_component.ravel())[1:]
    num_components = max(int(rim.components.max(initial=0)), len(num_full))
    num_full = np.pad(num_full, (1, num_components - len(num_full)))
    area = num_full + np.bincount(rim.components, rim.covered, num_components + 1)
    missing = _num_cells(area) - num_full
    row, column = np.divmod(rim.cells, full_component.shape[1])
    cell = row - 1 + origin[0], column - 1 + origin[1]
    order = _order(rim.covered, _neighbourhood_max(rim, full_component), cell, rim.components)
    component = rim.components[order]
    # Sorted by component first, so a rank inside it is the distance from its first entry.
    rank = np.arange(len(order)) - np.searchsorted(component, component)
    return rim.cells[order[rank < missing[component]]]


def _neighbourhood_max(rim: _RimCells, full_component: NDArray[np.int32]) -> NDArray[np.float64]:
    """[n] the largest share that the component has in a cell or in its eight neighbours."""
    width, num_labels = full_component.shape[1], int(rim.components.max(initial=0)) + 1
    key = rim.cells * num_labels + rim.components
    largest = rim.covered.copy()
    for offset in _around(width):
        wanted = key + offset * num_labels
        # Searched in the sorted pairs, because a grid per component would grow with their number.
        place = np.minimum(np.searchsorted(key, wanted), len(key) - 1)
        there = np.where(key[place] == wanted, rim.covered[place], 0.0)
        # Full cells are in no pair, and a neighbour counts only where it is of the same component.
        is_full = full_component.ravel()[rim.cells + offset] == rim.components
        largest = np.maximum(largest, np.where(is_full, 1.0, there))
    return largest
