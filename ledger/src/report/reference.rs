//! Device time of unlike machines in one unit: derived from what readings hold, never kept in their place.
use karez_core::{records::Benchmark, unit::DeviceMillis};

/// The unit's name and version. It is pinned to [`BENCHMARK`] and to [`SPEED_MILLI`]: another model or another speed would be
/// another version.
pub const UNIT: &str = "ref/1";
/// The measurement it is derived from: the speed at which a device writes sixteen answers at once with the reference model, a
/// Llama of 1.1 billion random numbers in Q4_0 (`karez_engine::reference` pins the file's BLAKE3).
pub const BENCHMARK: &str = "bench/1";
/// The reference device writes a hundred tokens in a second.
pub const SPEED_MILLI: u64 = 100_000;

/// How long the reference device would have taken for what a device so measured does in `held`; rounded down. `None` where
/// the device was not measured with [`BENCHMARK`]: an estimate is no measurement.
pub fn reference_time(benchmark: Option<&Benchmark>, held: DeviceMillis) -> Option<DeviceMillis> {
    let measured = benchmark.filter(|found| found.version == BENCHMARK)?;
    let ms = u128::from(held.0) * u128::from(measured.speed.0) / u128::from(SPEED_MILLI);
    Some(DeviceMillis(u64::try_from(ms).unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use karez_core::unit::Speed;

    #[test]
    fn a_device_twice_as_fast_counts_twice() {
        let of = |version: &str, milli| {
            let benchmark = Benchmark {
                version: version.into(),
                speed: Speed(milli),
            };
            reference_time(Some(&benchmark), DeviceMillis(1_500)).map(|ms| ms.0)
        };
        assert_eq!(of("bench/1", 200_000), Some(3_000));
        assert_eq!(of("bench/1", 100_000), Some(1_500));
        assert_eq!(of("bench/1", 1), Some(0));
        assert_eq!(
            of("bench/1", u64::MAX),
            Some(u64::MAX / 100_000 * 1_500 + (u64::MAX % 100_000) * 1_500 / 100_000)
        );
        // What was estimated, or measured in another way, is not the same unit.
        assert_eq!((of("probe/1", 200_000), of("bench/2", 200_000)), (None, None));
        assert_eq!(reference_time(None, DeviceMillis(1_500)), None);
    }
}
