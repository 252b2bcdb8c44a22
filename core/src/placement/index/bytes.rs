//! Rows of small numbers, one byte each, looked through eight at a time.
//!
//! All of them are under 128, so that the highest bit of each byte is free to hold the answer of a comparison.

const HIGH: u64 = 0x8080_8080_8080_8080;
const ONES: u64 = 0x0101_0101_0101_0101;

/// The highest bit of each byte of `word` that is at least `need`.
#[inline]
fn at_least(word: u64, need: u8) -> u64 {
    // No byte borrows from the next: each is 128 or more before, and `need` is under 128.
    (word | HIGH).wrapping_sub(ONES.wrapping_mul(need.into())) & HIGH
}

/// The first of `bytes` from `from` on that is at least `need`. The length must be a multiple of eight.
#[inline]
pub(super) fn find(bytes: &[u8], from: usize, need: u8) -> Option<usize> {
    let first = from / 8;
    // What lies before `from` in its word does not count.
    let mut keep = u64::MAX << (from % 8 * 8);
    for (i, eight) in bytes.chunks_exact(8).enumerate().skip(first) {
        let word = u64::from_le_bytes(eight.try_into().unwrap_or_default());
        let hits = at_least(word, need) & keep;
        if hits != 0 {
            return Some(i * 8 + hits.trailing_zeros() as usize / 8);
        }
        keep = u64::MAX;
    }
    None
}

/// One bit for each of 32 bytes that is at least `need`.
#[inline]
pub(super) fn mask(bytes: &[u8; 32], need: u8) -> u32 {
    let mut mask = 0;
    for (i, eight) in bytes.chunks_exact(8).enumerate() {
        let hits = at_least(u64::from_le_bytes(eight.try_into().unwrap_or_default()), need);
        // The product gathers the eight bits in the highest byte.
        let eight = (hits >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56;
        mask |= (eight as u32) << (i * 8);
    }
    mask
}

/// The largest.
#[inline]
pub(super) fn max(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |most, byte| most.max(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn eight_at_a_time_is_as_one_by_one(bytes in proptest::collection::vec(0..100u8, 32), need in 1..100u8, from in 0..32usize) {
            let plain = (from..32).find(|i| bytes[*i] >= need);
            prop_assert_eq!(find(&bytes, from, need), plain);
            let all: [u8; 32] = bytes.clone().try_into().unwrap();
            let plain = (0..32).filter(|i| bytes[*i] >= need).fold(0u32, |m, i| m | 1 << i);
            prop_assert_eq!(mask(&all, need), plain);
            prop_assert_eq!(Some(max(&bytes)), bytes.iter().copied().max());
        }
    }
}
