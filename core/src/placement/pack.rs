//! Packing: which node and which of its devices work should take so that what stays free can still be used.
//!
//! A share of a device that nobody wants in that size, or whole devices without the cores to feed them, are free on
//! paper only. [`Mix::stranded`] is how much of a node's free devices the usual work could not use, weighed by how often it
//! comes: the measure of Weng et al., Beware of Fragmentation (USENIX ATC 2023). [`best`] takes what strands least. What
//! they leave open is which of many equal choices to take, and most choices are equal: here it is the node whose free
//! devices would be fewest afterwards, then the one whose cores and memory are then nearest to what those devices need, so
//! that large whole pieces stay, and what is left of others can be fed.
//!
//! It decides between places that cost the same; never against a cheaper one. Pure integers: equal inputs, equal answers.
use crate::prelude::*;

/// Devices of one node that are told apart.
pub const DEVICES: usize = 8;
/// All of a device.
const WHOLE: u32 = 1_000;

/// What is free on one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Thousandths of a core.
    pub cpu_milli: u64,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Of each device, in thousandths; zero where there is none.
    pub devices: [u32; DEVICES],
    /// Which class of device: a number under 64.
    pub class: u8,
}

/// What one part takes of one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Need {
    /// Thousandths of a core.
    pub cpu_milli: u64,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// How many devices; zero for work without any.
    pub devices: u32,
    /// Of each, in thousandths: under 1000 only where it is one device.
    pub share: u32,
    /// One bit for each class of device that will do.
    pub classes: u64,
}

/// The choice on one node: the lower, the better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fit {
    /// By how much the work strands more than was, weighed; below zero where it uses what was stranded.
    pub stranded: i64,
    /// Thousandths of devices that stay free.
    pub left: u32,
    /// How far cores and memory are from the devices that stay free.
    pub skew: u64,
    /// One bit for each device it takes.
    pub taken: u8,
}

impl Room {
    fn free(&self) -> u32 {
        self.devices.iter().sum()
    }

    /// Whether it holds the work now.
    pub fn holds(&self, need: &Need) -> bool {
        if self.cpu_milli < need.cpu_milli || self.memory_mib < need.memory_mib {
            return false;
        }
        let devices = self.devices.iter().filter(|free| **free >= need.share).count();
        need.devices == 0 || (need.classes >> self.class & 1 == 1 && devices >= need.devices as usize)
    }

    /// After the work has taken those devices, which [`best`] named.
    pub fn after(&self, need: &Need, taken: u8) -> Self {
        let mut room = *self;
        room.cpu_milli = room.cpu_milli.saturating_sub(need.cpu_milli);
        room.memory_mib = room.memory_mib.saturating_sub(need.memory_mib);
        for (i, free) in room.devices.iter_mut().enumerate() {
            if taken >> i & 1 == 1 {
                *free = free.saturating_sub(need.share);
            }
        }
        room
    }
}

/// The usual work, with how often it comes.
#[derive(Debug, Clone, Default)]
pub struct Mix(Vec<(Need, u64)>);

impl Mix {
    /// From work that was seen: the `most` commonest needs of devices.
    pub fn of<'a>(seen: impl IntoIterator<Item = &'a Need>, most: usize) -> Self {
        let mut counts: BTreeMap<Need, u64> = BTreeMap::new();
        for need in seen.into_iter().filter(|need| need.devices > 0) {
            *counts.entry(*need).or_insert(0) += 1;
        }
        let mut list: Vec<(Need, u64)> = counts.into_iter().collect();
        list.sort_by_key(|(_, count)| core::cmp::Reverse(*count));
        list.truncate(most);
        Self(list)
    }

    /// Thousandths of devices that are free there and could not be used, summed over the usual work by how often each
    /// comes.
    pub fn stranded(&self, room: &Room) -> i64 {
        let free = room.free();
        if free == 0 {
            return 0;
        }
        let sum: u64 = self
            .0
            .iter()
            .map(|(need, count)| {
                let lost = if room.holds(need) {
                    room.devices.iter().filter(|free| **free < need.share).sum()
                } else {
                    free
                };
                u64::from(lost) * count
            })
            .sum();
        i64::try_from(sum).unwrap_or(i64::MAX)
    }
}

/// The best choice of devices there, or `None` when the work does not fit. `stranded` is what [`Mix::stranded`] says of the
/// room before.
pub fn best(room: &Room, stranded: i64, need: &Need, mix: &Mix) -> Option<Fit> {
    if !room.holds(need) {
        return None;
    }
    let judge = |taken: u8| {
        let after = room.after(need, taken);
        Fit {
            stranded: mix.stranded(&after).saturating_sub(stranded),
            left: after.free(),
            skew: skew(&after),
            taken,
        }
    };
    if need.devices == 0 {
        return Some(judge(0));
    }
    if need.devices > 1 || need.share >= WHOLE {
        let mut taken = 0u8;
        for (i, free) in room.devices.iter().enumerate() {
            if *free >= need.share && taken.count_ones() < need.devices {
                taken |= 1 << i;
            }
        }
        return Some(judge(taken));
    }
    // Devices with as much free are the same choice.
    let mut tried = [0u32; DEVICES];
    let mut best: Option<Fit> = None;
    for (i, free) in room.devices.iter().enumerate() {
        if *free < need.share || tried[..i].contains(free) {
            continue;
        }
        tried[i] = *free;
        let fit = judge(1 << i);
        best = Some(best.map_or(fit, |known| known.min(fit)));
    }
    best
}

/// How far cores (eight to a device) and memory (32 GiB to a device) are from what the free devices would take.
fn skew(room: &Room) -> u64 {
    let free = u64::from(room.free());
    (room.cpu_milli / 8).abs_diff(free) + (room.memory_mib * 1_000 / 32_768).abs_diff(free)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn room(devices: &[u32]) -> Room {
        let mut all = [0; DEVICES];
        all[..devices.len()].copy_from_slice(devices);
        Room {
            cpu_milli: 64_000,
            memory_mib: 256_000,
            devices: all,
            class: 0,
        }
    }

    fn need(devices: u32, share: u32) -> Need {
        Need {
            cpu_milli: 4_000,
            memory_mib: 8_000,
            devices,
            share,
            classes: 1,
        }
    }

    #[test]
    fn what_nobody_could_use_is_stranded() {
        let mix = Mix::of(&[need(1, 500), need(1, 500), need(2, 1_000)], 10);
        for (name, room, expected) in [
            ("nothing free", room(&[]), 0),
            ("a half: for two of three", room(&[500]), 500),
            ("less than a half: for nobody", room(&[400]), 3 * 400),
            ("two whole: for all", room(&[1_000, 1_000]), 0),
            ("one whole: not for the third", room(&[1_000]), 1_000),
            (
                "no cores",
                Room {
                    cpu_milli: 100,
                    ..room(&[1_000, 1_000])
                },
                3 * 2_000,
            ),
            (
                "another class",
                Room {
                    class: 3,
                    ..room(&[1_000, 1_000])
                },
                3 * 2_000,
            ),
        ] {
            assert_eq!(mix.stranded(&room), expected, "{name}");
        }
    }

    #[test]
    fn a_share_goes_where_it_leaves_nothing_useless() {
        let mix = Mix::of(&[need(1, 500), need(2, 1_000)], 10);
        let there = room(&[1_000, 1_000, 500, 700]);
        let fit = best(&there, mix.stranded(&there), &need(1, 500), &mix).unwrap();
        assert_eq!(fit.taken, 0b0100, "the half, exactly");
        let whole = best(&there, mix.stranded(&there), &need(2, 1_000), &mix).unwrap();
        assert_eq!(whole.taken, 0b0011);
        assert_eq!(best(&there, 0, &need(3, 1_000), &mix), None);
    }

    proptest! {
        /// A choice fits, takes as many devices as asked for, and no other device would have stranded less.
        #[test]
        fn no_other_device_strands_less(
            free in proptest::collection::vec(0..=20u32, 1..8),
            wants in proptest::collection::vec((1..3u32, 1..=20u32), 1..6),
        ) {
            let make = |(devices, share): &(u32, u32)| match devices {
                1 => need(1, share * 50),
                n => need(*n, 1_000),
            };
            let needs: Vec<Need> = wants.iter().map(make).collect();
            let mix = Mix::of(&needs, 4);
            let there = room(&free.iter().map(|f| f * 50).collect::<Vec<_>>());
            let before = mix.stranded(&there);
            let need = needs[0];
            let Some(fit) = best(&there, before, &need, &mix) else {
                prop_assert!(!there.holds(&need));
                return Ok(());
            };
            prop_assert_eq!(fit.taken.count_ones(), need.devices);
            let after = there.after(&need, fit.taken);
            prop_assert_eq!(there.free() - after.free(), need.devices * need.share);
            if need.devices == 1 {
                for i in (0..free.len()).filter(|i| there.devices[*i] >= need.share) {
                    prop_assert!(mix.stranded(&there.after(&need, 1 << i)) - before >= fit.stranded);
                }
            }
        }
    }
}
