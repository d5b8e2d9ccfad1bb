//! Mathematical functions over registers, computed with polynomials.

use super::simd::{Element, Simd};

/// 2 to the power of `x`, with a relative error of at most 1e-7. For `x` below -126 the result is not exact,
/// but nearly 0.
#[inline(always)]
pub(super) unsafe fn exp2<V: Simd>(x: V) -> V {
    // Least squares on [-0.5, 0.5], reweighted to minimise the largest relative error.
    const TERMS: [f32; 6] =
        [1.000_000_1, 0.693_146_94, 0.240_221_2, 0.055_507_13, 0.009_675_542, 0.001_327_647_2];
    // SAFETY: the caller's CPU has the lanes' instructions.
    unsafe {
        let x = x.max(V::splat(-126.0));
        let whole = x.round();
        let rest = x.sub(whole);
        let mut sum = V::splat(TERMS[5]);
        for term in TERMS[..5].iter().rev() {
            sum = sum.mul_add(rest, V::splat(*term));
        }
        sum.scale(whole)
    }
}

/// `x * Phi(x)`. Between two bounds, the normal distribution is computed with an odd polynomial.
#[inline(always)]
pub(super) unsafe fn gelu<E: Element, V: Simd>(x: V) -> V {
    // SAFETY: the caller's CPU has the lanes' instructions.
    unsafe {
        let bounded = x.max(V::splat(-E::GELU_BOUND)).min(V::splat(E::GELU_BOUND));
        let square = bounded.mul(bounded);
        let (last, others) = E::GELU.split_last().unwrap_or((&0.0, &[]));
        let mut sum = V::splat(*last);
        for term in others.iter().rev() {
            sum = sum.mul_add(square, V::splat(*term));
        }
        sum.mul_add(bounded, V::splat(0.5)).mul(x)
    }
}
