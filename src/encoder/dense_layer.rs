//! Weights in a kernel's layout, and products with them.

use std::marker::PhantomData;
use std::ops::Range;

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

    /// Divides a product with `rows` rows into units of work.
    #[inline(always)]
    pub(super) fn divide(&self, rows: usize) -> Division<K> {
        Division::new(rows, self.columns.div_ceil(K::COLUMNS))
    }

    /// First column and width of a panel.
    #[inline(always)]
    fn span(&self, panel: usize) -> (usize, usize) {
        let first = panel * K::COLUMNS;
        (first, K::COLUMNS.min(self.columns - first))
    }

    /// A part of a panel: at most `depth` deep, from depth `from` on.
    #[inline(always)]
    fn part(&self, panel: usize, from: usize, depth: usize) -> RightPanel<K> {
        let (first, width) = self.span(panel);
        RightPanel {
            data: self.weights.as_ptr().wrapping_add(first * self.depth + from * width),
            depth: depth.min(self.depth - from),
            columns: width,
            scales: self.scales.as_ptr().wrapping_add(first),
            sums: self.sums.as_ptr().wrapping_add(from / K::CHUNK * self.columns + first),
        }
    }

    /// Adds one unit of the product to `totals`, whose rows are `stride` apart. Does not add biases.
    ///
    /// # Safety
    ///
    /// `left` must have the rows of the unit's division with the depth of this layer. `totals` must have
    /// these rows with the columns of this layer. Both must have slack.
    #[inline(always)]
    pub(super) unsafe fn add_to(&self, unit: &Unit, left: LeftMatrix<K>, totals: *mut f32, stride: usize) {
        // SAFETY: guaranteed by the caller; tiles stay within the rows.
        unsafe {
            for panel in unit.panels.clone() {
                let (first, _) = self.span(panel);
                for from in (0..self.depth).step_by(unit.depth) {
                    let right = self.part(panel, from, unit.depth);
                    for (row, count) in Tiles::new::<K>(unit.rows.clone()) {
                        let data = totals.add(row * stride + first);
                        K::tile(left.at(row, from), count, &right, Accumulators { data, stride, add: true });
                    }
                }
            }
        }
    }

    /// Passes one unit of the product, with biases added, to `finish` by row and column. `partial` must have
    /// room for the rows of one panel, with slack.
    ///
    /// # Safety
    ///
    /// As for [`Dense::add_to`].
    #[inline(always)]
    pub(super) unsafe fn finish<F: Epilogue<K::Simd>>(
        &self,
        unit: &Unit,
        left: LeftMatrix<K>,
        partial: *mut f32,
        finish: &F,
    ) {
        // SAFETY: guaranteed by the caller; tiles stay within the rows.
        unsafe {
            for panel in unit.panels.clone() {
                let (first, width) = self.span(panel);
                for from in (0..self.depth).step_by(unit.depth) {
                    let right = self.part(panel, from, unit.depth);
                    let is_last = from + right.depth == self.depth;
                    for (row, count) in Tiles::new::<K>(unit.rows.clone()) {
                        // With only one part, all tiles use the same place, so that the sums stay in the
                        // nearest cache.
                        let place = if right.depth == self.depth { 0 } else { row - unit.rows.start };
                        let data = partial.add(place * width);
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
}

/// A product, divided into units of work that give the same numbers whatever thread does them, and in
/// whatever order.
///
/// A unit is usually one panel with all rows: a part of the panel stays in the nearest cache, and the rows
/// stream. Kernels with [`Kernel::KEEPS_ROWS`] do it the other way round if there are several blocks of rows.
/// A unit is then one tile of rows with all panels. Both add in the same order, so that the sums have the same
/// bits.
pub(super) struct Division<K> {
    rows: usize,
    panels: usize,
    by_rows: bool,
    kernel: PhantomData<K>,
}

impl<K: Kernel> Division<K> {
    #[inline(always)]
    fn new(rows: usize, panels: usize) -> Self {
        // With one or two blocks the rows stay in the nearest cache anyway, and panels are more units for two
        // threads that share one short text.
        let by_rows = K::KEEPS_ROWS && rows > 2 * K::ROWS;
        Self { rows, panels, by_rows, kernel: PhantomData }
    }

    /// Number of units.
    #[inline(always)]
    pub(super) fn units(&self) -> usize {
        if self.by_rows { self.rows.div_ceil(K::ROWS) } else { self.panels }
    }

    /// One of the units.
    #[inline(always)]
    pub(super) fn unit(&self, number: usize) -> Unit {
        if self.by_rows {
            let first = number * K::ROWS;
            let rows = first..self.rows.min(first + K::ROWS);
            // Quantized kernels scale the sums of each part by itself.
            let depth = if K::QUANTIZED { K::CHUNK } else { usize::MAX };
            Unit { rows, panels: 0..self.panels, depth }
        } else {
            Unit { rows: 0..self.rows, panels: number..number + 1, depth: K::CHUNK }
        }
    }
}

/// A unit of a product.
pub(super) struct Unit {
    rows: Range<usize>,
    panels: Range<usize>,
    /// Depth of the part of a panel that is multiplied at a time.
    depth: usize,
}

/// Divides rows into tiles of nearly equal size, so that no tile needs padding. Yields first row and number
/// of rows.
pub(super) struct Tiles {
    row: usize,
    end: usize,
    remaining: usize,
    step: usize,
}

impl Tiles {
    #[inline(always)]
    pub(super) fn new<K: Kernel>(rows: Range<usize>) -> Self {
        Self { row: rows.start, end: rows.end, remaining: rows.len().div_ceil(K::ROWS), step: K::STEP }
    }
}

impl Iterator for Tiles {
    type Item = (usize, usize);

    #[inline(always)]
    fn next(&mut self) -> Option<(usize, usize)> {
        if self.remaining == 0 {
            return None;
        }
        let rows = self.end - self.row;
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

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{RngExt as _, SeedableRng as _};

    use super::super::kernel::{Quantization, SLACK, WithSimd};
    use super::*;

    /// Several parts of a panel with every kernel.
    const DEPTH: usize = 1536;
    const COLUMNS: usize = 96;

    /// All units of a product, by both functions.
    struct Product<'a, K: Kernel> {
        dense: &'a Dense<K>,
        division: Division<K>,
        numbers: &'a [f32],
        /// Sums with biases, and sums without biases.
        results: [&'a mut Buffer<f32>; 2],
    }

    impl<K: Kernel> WithSimd for Product<'_, K> {
        type Output = ();

        #[inline(always)]
        unsafe fn run(self) {
            let rows = self.division.rows;
            let places = (rows + SLACK) * DEPTH;
            let mut elements = Buffer::<K::Element>::zeroed(places);
            let mut operands = Buffer::<K::Operand>::zeroed(places);
            let mut quantizations = vec![Quantization::default(); rows + SLACK];
            let mut partial = Buffer::<f32>::zeroed((rows + SLACK) * K::COLUMNS);
            let [finished, added] = self.results;
            // SAFETY: the CPU has the instructions, and all buffers have room for the rows, with slack.
            unsafe {
                for at in (0..rows * DEPTH).step_by(K::Simd::LANES) {
                    let numbers = K::Simd::load(self.numbers.as_ptr().add(at));
                    K::Element::put(numbers, elements.as_mut_ptr().add(at));
                }
                let (to, quantizations) = (operands.as_mut_ptr(), quantizations.as_mut_ptr());
                K::prepare(elements.as_ptr(), rows, DEPTH, to, quantizations);
                let left = K::left(elements.as_ptr(), DEPTH, operands.as_ptr(), quantizations);
                let store = StoreEpilogue { to: finished.as_mut_ptr(), stride: COLUMNS };
                for number in 0..self.division.units() {
                    let unit = self.division.unit(number);
                    self.dense.finish(&unit, left, partial.as_mut_ptr(), &store);
                    self.dense.add_to(&unit, left, added.as_mut_ptr(), COLUMNS);
                }
            }
        }
    }

    /// Units by panels and units by rows must give the same bits, near the exact sums.
    fn compare<K: Kernel>(name: &str) {
        let mut random = StdRng::seed_from_u64(1);
        let mut numbers =
            |count: usize| -> Vec<f32> { (0..count).map(|_| random.random_range(-1.0_f32..1.0)).collect() };
        let weights = numbers(COLUMNS * DEPTH);
        let mut bias = Buffer::zeroed(COLUMNS);
        bias.as_mut_slice().copy_from_slice(&numbers(COLUMNS));
        let dense = Dense::<K>::new(&weights, DEPTH, bias);
        for rows in [1, 17, 65, 100] {
            let left = numbers(rows * DEPTH);
            let product = |by_rows: bool| {
                let buffer = || Buffer::<f32>::zeroed((rows + SLACK) * COLUMNS);
                let (mut finished, mut added) = (buffer(), buffer());
                let division = Division { by_rows, ..dense.divide(rows) };
                let results = [&mut finished, &mut added];
                // SAFETY: the caller has checked that the kernel works here.
                unsafe { K::vectorize(Product { dense: &dense, division, numbers: &left, results }) };
                [finished, added].map(|sums| sums.as_slice()[..rows * COLUMNS].to_vec())
            };
            let [by_panels, by_rows] = [product(false), product(true)];
            assert!(by_panels == by_rows, "{name}, {rows} rows: other bits by rows");
            for (at, (finished, added)) in by_rows[0].iter().zip(&by_rows[1]).enumerate() {
                let (row, column) = (at / COLUMNS, at % COLUMNS);
                let (left, right) = (&left[row * DEPTH..][..DEPTH], &weights[column * DEPTH..][..DEPTH]);
                let exact: f64 = left.iter().zip(right).map(|(a, b)| f64::from(a * b)).sum();
                let biased = exact + f64::from(dense.bias.as_slice()[column]);
                for (sum, exact) in [(*added, exact), (*finished, biased)] {
                    let off = (f64::from(sum) - exact).abs();
                    assert!(off < 1.0, "{name}, row {row}, column {column}: {sum}, not {exact}");
                }
            }
        }
        println!("{name}: the same bits");
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn every_kernel_gives_the_same_bits_by_panels_and_by_rows() {
        use super::super::kernel::{amx, avx2, avx512, portable};
        use crate::KernelKind::{
            AmxBf16, AmxInt8, Avx2, Avx2Bf16, Avx2Int8, Avx512, Avx512Bf16, Avx512Int8, Portable,
        };
        let kernels: [(_, fn(&str)); 9] = [
            (Portable, compare::<portable::Portable>),
            (Avx2, compare::<avx2::F32>),
            (Avx2Bf16, compare::<avx2::Bf16>),
            (Avx2Int8, compare::<avx2::Int8>),
            (Avx512, compare::<avx512::F32>),
            (Avx512Bf16, compare::<avx512::Bf16>),
            (Avx512Int8, compare::<avx512::Int8>),
            (AmxBf16, compare::<amx::Bf16>),
            (AmxInt8, compare::<amx::Int8>),
        ];
        for (kind, compare) in kernels {
            // The stages around AMX's products need AVX-512 with bf16; the tiles can be emulated.
            #[cfg(target_os = "linux")]
            let can_run = kind.is_supported()
                || matches!(kind, AmxBf16 | AmxInt8)
                    && Avx512Bf16.is_supported()
                    && super::super::kernel::amx_emulator::install();
            #[cfg(not(target_os = "linux"))]
            let can_run = kind.is_supported();
            if can_run {
                compare(kind.name());
            } else {
                println!("{kind}: not tried, because this CPU does not have its instructions");
            }
        }
    }
}
