//! Weights in a kernel's layout, and products with them.

use super::aligned_buffer::Buffer;
use super::kernel::{Accumulators, Kernel, LeftMatrix, RightPanel};
use super::math;
use super::simd::{Element, Simd};

/// A dense layer: weights in panels, and biases.
///
/// `scales` and `sums` are empty unless the kernel is quantized.
pub(super) struct Dense<K: Kernel> {
    weights: Buffer<K::Weight>,
    /// Depth of the product, a multiple of [`Kernel::DEPTH`].
    depth: usize,
    /// Columns of the product, a multiple of 32.
    columns: usize,
    /// One bias for each column.
    pub(super) bias: Buffer<f32>,
    /// One scale for each column.
    scales: Buffer<f32>,
    /// For each part in depth, one sum for each column.
    sums: Buffer<f32>,
}

impl<K: Kernel> Dense<K> {
    /// Lays out a matrix of `columns` by `depth` numbers, column after column.
    pub(super) fn new(matrix: &[f32], depth: usize, bias: Buffer<f32>) -> Self {
        let columns = matrix.len() / depth;
        assert_eq!(bias.len(), columns, "a bias for each column");
        let parts = depth.div_ceil(K::CHUNK);
        let per_column = |count: usize| Buffer::<f32>::zeroed(if K::QUANTIZED { count } else { 0 });
        let (mut scales, mut sums) = (per_column(columns), per_column(parts * columns));
        let mut weights = Buffer::zeroed(matrix.len());
        let mut encoded = Buffer::<K::Weight>::zeroed(depth);
        for (column, numbers) in matrix.chunks_exact(depth).enumerate() {
            let scale = K::encode(numbers, encoded.as_mut_slice());
            if K::QUANTIZED {
                scales.as_mut_slice()[column] = scale;
                for (part, units) in encoded.as_slice().chunks(K::CHUNK).enumerate() {
                    let sum = units.iter().map(|unit| K::units(*unit)).sum();
                    sums.as_mut_slice()[part * columns + column] = sum;
                }
            }
            let first = column / K::COLUMNS * K::COLUMNS;
            let width = K::COLUMNS.min(columns - first);
            let panel = &mut weights.as_mut_slice()[first * depth..][..width * depth];
            for (group, units) in encoded.as_slice().chunks_exact(K::GROUP).enumerate() {
                panel[(group * width + column - first) * K::GROUP..][..K::GROUP].copy_from_slice(units);
            }
        }
        Self { weights, depth, columns, bias, scales, sums }
    }

    /// Number of panels. Each panel is a unit of work.
    #[inline(always)]
    pub(super) fn panels(&self) -> usize {
        self.columns.div_ceil(K::COLUMNS)
    }

    /// First column and width of a panel.
    #[inline(always)]
    fn span(&self, panel: usize) -> (usize, usize) {
        let first = panel * K::COLUMNS;
        (first, K::COLUMNS.min(self.columns - first))
    }

    #[inline(always)]
    fn part(&self, panel: usize, from: usize) -> RightPanel<K> {
        let (first, width) = self.span(panel);
        RightPanel {
            data: self.weights.as_ptr().wrapping_add(first * self.depth + from * width),
            depth: K::CHUNK.min(self.depth - from),
            columns: width,
            scales: self.scales.as_ptr().wrapping_add(first),
            sums: self.sums.as_ptr().wrapping_add(from / K::CHUNK * self.columns + first),
        }
    }

    /// Adds the product with one panel to `totals`, whose rows are `stride` apart. Does not add biases.
    ///
    /// # Safety
    ///
    /// `left` must have `rows` rows with the depth of this layer. `totals` must have `rows` rows with the
    /// columns of this layer. Both must have slack.
    #[inline(always)]
    pub(super) unsafe fn add_to(
        &self,
        panel: usize,
        left: LeftMatrix<K>,
        rows: usize,
        totals: *mut f32,
        stride: usize,
    ) {
        // SAFETY: guaranteed by the caller; tiles stay within the rows.
        unsafe {
            let (first, _) = self.span(panel);
            for from in (0..self.depth).step_by(K::CHUNK) {
                let right = self.part(panel, from);
                for (row, count) in Tiles::new::<K>(rows) {
                    let data = totals.add(row * stride + first);
                    K::tile(left.at(row, from), count, &right, Accumulators { data, stride, add: true });
                }
            }
        }
    }

    /// Passes the product with one panel, with biases added, to `finish` by row and column. `partial` must
    /// have room for the rows of one panel, with slack.
    ///
    /// # Safety
    ///
    /// As for [`Dense::add_to`].
    #[inline(always)]
    pub(super) unsafe fn finish<F: Epilogue<K::Simd>>(
        &self,
        panel: usize,
        left: LeftMatrix<K>,
        rows: usize,
        partial: *mut f32,
        finish: &F,
    ) {
        // SAFETY: guaranteed by the caller; tiles stay within the rows.
        unsafe {
            let (first, width) = self.span(panel);
            for from in (0..self.depth).step_by(K::CHUNK) {
                let right = self.part(panel, from);
                let is_last = from + right.depth == self.depth;
                for (row, count) in Tiles::new::<K>(rows) {
                    // With only one part, all tiles use the same place, so that the sums stay in the nearest
                    // cache.
                    let first_row = if right.depth == self.depth { 0 } else { row };
                    let data = partial.add(first_row * width);
                    K::tile(
                        left.at(row, from),
                        count,
                        &right,
                        Accumulators { data, stride: width, add: from > 0 },
                    );
                    if is_last {
                        for column in (0..width).step_by(K::Simd::LANES) {
                            let bias = K::Simd::load(self.bias.as_ptr().add(first + column));
                            for at in 0..count {
                                let sum = K::Simd::load(data.add(at * width + column)).add(bias);
                                finish.finish(row + at, first + column, sum);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Divides rows into tiles of nearly equal size, so that no tile needs padding. Yields first row and number
/// of rows.
pub(super) struct Tiles {
    row: usize,
    rows: usize,
    remaining: usize,
    step: usize,
}

impl Tiles {
    #[inline(always)]
    pub(super) fn new<K: Kernel>(rows: usize) -> Self {
        Self { row: 0, rows, remaining: rows.div_ceil(K::ROWS), step: K::STEP }
    }
}

impl Iterator for Tiles {
    type Item = (usize, usize);

    #[inline(always)]
    fn next(&mut self) -> Option<(usize, usize)> {
        if self.remaining == 0 {
            return None;
        }
        let rows = self.rows - self.row;
        let count = rows.div_ceil(self.remaining).next_multiple_of(self.step).min(rows);
        let row = self.row;
        self.row += count;
        self.remaining -= 1;
        Some((row, count))
    }
}

/// Receiver of the numbers of a product.
pub(super) trait Epilogue<V: Simd> {
    /// Takes one register of numbers, from `column` on.
    unsafe fn finish(&self, row: usize, column: usize, numbers: V);
}

/// Stores the numbers as elements.
pub(super) struct StoreEpilogue<E> {
    pub(super) to: *mut E,
    pub(super) stride: usize,
}

impl<E: Element, V: Simd> Epilogue<V> for StoreEpilogue<E> {
    #[inline(always)]
    unsafe fn finish(&self, row: usize, column: usize, numbers: V) {
        // SAFETY: the caller's matrix has this row and these columns.
        unsafe { E::put(numbers, self.to.add(row * self.stride + column)) }
    }
}

/// Stores the [`math::gelu`] of the numbers as elements.
pub(super) struct GeluEpilogue<E> {
    pub(super) to: *mut E,
    pub(super) stride: usize,
}

impl<E: Element, V: Simd> Epilogue<V> for GeluEpilogue<E> {
    #[inline(always)]
    unsafe fn finish(&self, row: usize, column: usize, numbers: V) {
        // SAFETY: the caller's matrix has this row and these columns.
        unsafe { E::put(math::gelu::<E, V>(numbers), self.to.add(row * self.stride + column)) }
    }
}
