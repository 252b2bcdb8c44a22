//! Leases as the nodes' disks tell them, workers as they really ran, and owners who want their machines.
use super::{Checker, Execution, Rule, Seen};
use crate::disk::Disk;
use karez_core::{
    id::{Digest, Fence, JobId, LeaseKey, PartIndex},
    records::{Lease, Signed},
    store::Change,
    unit::WHOLE,
};
use serde_json::Value;

impl Checker {
    /// A node's changes are on its disk.
    pub fn node_disk(&mut self, n: usize, changes: &[Change]) {
        for change in changes {
            match change {
                Change::Put {
                    table: "leases",
                    key,
                    value,
                } => self.lease_row(n, key, value),
                Change::Delete { table: "leases", key } => {
                    if let Some(key) = lease_key(key)
                        && let Some(seen) = self.leases.get_mut(&key)
                        && seen.node == n
                        && seen.live
                    {
                        self.fail(format!("{key} was forgotten while it lived"));
                    }
                }
                Change::Post { .. } => self.fail("a node posted to a ledger".into()),
                _ => {}
            }
        }
    }

    fn lease_row(&mut self, n: usize, row: &[u8], value: &[u8]) {
        let Some(key) = lease_key(row) else {
            return self.fail("a lease row has a bad key".into());
        };
        let Ok(value) = serde_json::from_slice::<Value>(value) else {
            return self.fail(format!("the row of {key} cannot be read"));
        };
        let live = match &value["stage"] {
            Value::String(stage) => stage == "Granted" || stage == "Running",
            _ => false,
        };
        match self.leases.get_mut(&key) {
            Some(seen) if seen.node != n => {
                let other = seen.node;
                self.fail(format!("{key} was granted by node {other} and by node {n}"));
            }
            Some(seen) if live && !seen.live => self.fail(format!("{key} lives again after it ended")),
            Some(seen) => {
                let over = seen.live && !live;
                seen.live = live;
                if over {
                    self.held[n].remove(&seen.class, seen.devices, seen.slot);
                }
            }
            None => self.granted(n, key, &value, live),
        }
    }

    fn granted(&mut self, n: usize, key: LeaseKey, value: &Value, live: bool) {
        let lease = value["lease"]
            .as_str()
            .and_then(unhex)
            .and_then(|bytes| Signed::<Lease>::open(&bytes).ok());
        let Some(lease) = lease else {
            return self.fail(format!("the lease of {key} cannot be read"));
        };
        if let Err(rule) = self.lease_allowed(n, &key, &lease) {
            self.fail(format!("{key} on node {n}: {rule}"));
        }
        self.judged(Rule::LeasedOnce);
        self.judged(Rule::Residency);
        if live && let Err(rule) = self.together(n, &key) {
            self.fail(rule);
        }
        let slot = value["slot"].as_u64().unwrap_or(0) as u32;
        if live {
            let class = &lease.device_class;
            let (held, of_one) = self.held[n].add(class, lease.devices, slot);
            let has = self.nodes[n].device(class).map_or(0, |d| d.count);
            if held > has {
                self.fail(format!("node {n} has {has} {class} and promised {held}"));
            }
            if of_one > WHOLE {
                self.fail(format!("node {n} promised {of_one} thousandths of one {class}"));
            }
        }
        self.leases.insert(
            key,
            Seen {
                node: n,
                class: lease.device_class.clone(),
                devices: lease.devices,
                slot,
                live,
            },
        );
        let last = self.fences_granted.entry((n, key.job, key.part)).or_default();
        if key.fence <= *last {
            let last = *last;
            self.fail(format!("node {n} granted {key} after fence {last}"));
        } else {
            *last = key.fence;
        }
    }

    fn lease_allowed(&self, n: usize, key: &LeaseKey, lease: &Lease) -> Result<(), String> {
        let node = &self.nodes[n];
        let named = self.scheduler_of(&key.job).map(|s| self.sides[s].id);
        if lease.key() != *key || lease.node != node.id || Some(lease.scheduler) != named {
            return Err("the lease names somebody else".into());
        }
        let (asked, rate) = self.asked.get(key).ok_or("nobody asked for it")?;
        if *asked != node.id {
            return Err("another node was asked".into());
        }
        let order = self.orders.get(&key.job).ok_or("nobody signed its order")?;
        let device = node
            .device(&lease.device_class)
            .ok_or("there is no such device")?;
        node.allowed(order, device)?;
        let c = &order.constraints;
        let wanted = match c.share_milli {
            0 => c.devices.max(1) * WHOLE,
            share => share,
        };
        if lease.devices.milli() != wanted {
            return Err(format!(
                "it takes {} devices, another number than its order wants",
                lease.devices
            ));
        }
        if lease.rate > *rate || lease.rate != device.rate {
            return Err(format!(
                "it costs {}, offered {}, asked {rate}",
                lease.rate, device.rate
            ));
        }
        let end = lease
            .first_item
            .checked_add(lease.items)
            .ok_or("its items overflow")?;
        if lease.items == 0 || end > order.items {
            return Err("it covers items the order does not have".into());
        }
        if lease
            .rate
            .bill(lease.device_ms_max)
            .is_none_or(|bill| bill > order.credits_max)
        {
            return Err("it may bill more than its job may cost".into());
        }
        Ok(())
    }

    // What really ran.

    /// A worker starts.
    pub fn started(&mut self, n: usize, key: LeaseKey, now: u64, disk: &Disk) {
        let row: Vec<u8> = lease_row_key(&key);
        if disk.get("leases", &row).is_none() {
            self.fail(format!("a worker of {key} started before the intent was stored"));
        }
        let run = Execution {
            began: now,
            ended: None,
        };
        if self.executions.insert((n, key), run).is_some() {
            self.fail(format!("{key} was started twice on node {n}"));
        }
        self.judged(Rule::OwnerFirst);
        if self.wanted[n].is_some() {
            self.fail(format!(
                "{key} was started on node {n} though its owner wants the machine"
            ));
        }
        if let Some(seen) = self.leases.get(&key) {
            let class = seen.class.clone();
            let (running, of_one) = self.running[n].add(&class, seen.devices, seen.slot);
            let has = self.nodes[n].device(&class).map_or(0, |d| d.count);
            if running > has {
                self.fail(format!("node {n} has {has} {class} and runs {running}"));
            }
            if of_one > WHOLE {
                self.fail(format!("node {n} runs {of_one} thousandths on one {class}"));
            }
        }
    }

    /// A worker is gone.
    pub fn exited(&mut self, n: usize, key: LeaseKey, now: u64, done: bool) {
        let Some(run) = self.executions.get_mut(&(n, key)) else {
            return;
        };
        run.ended = Some((now, done));
        if let Some(seen) = self.leases.get(&key) {
            self.running[n].remove(&seen.class, seen.devices, seen.slot);
        }
        if let Some(since) = self.wanted[n] {
            self.leaving_ms_max = self.leaving_ms_max.max(now - since);
        }
    }

    /// A machine went down, and these workers with it.
    pub fn died<'a>(&mut self, n: usize, now: u64, workers: impl Iterator<Item = &'a LeaseKey>) {
        for key in workers {
            if let Some(run) = self.executions.get_mut(&(n, *key)) {
                run.ended = Some((now, false));
            }
        }
        self.running[n].clear();
    }

    // The owner.

    /// The owner wants the machine from now on, or lends it again. Nobody else tells the judge.
    pub fn owner_wants(&mut self, n: usize, since: Option<u64>) {
        self.wanted[n] = since;
    }

    /// The grace is over: the owner sits down at the machine.
    pub fn owner_sits_down(&mut self, n: usize, since: u64, now: u64) {
        if self.wanted[n] != Some(since) {
            return;
        }
        self.judged(Rule::OwnerFirst);
        let guests = self.running[n].all();
        if guests > 0 {
            let waited = now - since;
            self.fail(format!(
                "node {n}: its owner waits since {waited} ms, guests still hold {guests} devices"
            ));
        }
    }
}

/// Reads the key of a row in a node's table of leases.
fn lease_key(row: &[u8]) -> Option<LeaseKey> {
    let (job, rest) = row.split_at_checked(32)?;
    let (part, fence) = rest.split_at_checked(4)?;
    Some(LeaseKey {
        job: JobId(Digest::try_from(job).ok()?),
        part: PartIndex::from_be_bytes(part.try_into().ok()?),
        fence: Fence::from_be_bytes(fence.try_into().ok()?),
    })
}

fn lease_row_key(key: &LeaseKey) -> Vec<u8> {
    let mut out = key.job.0.0.to_vec();
    out.extend_from_slice(&key.part.to_be_bytes());
    out.extend_from_slice(&key.fence.to_be_bytes());
    out
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |b: u8| char::from(b).to_digit(16);
    text.as_bytes()
        .chunks(2)
        .map(|pair| match pair {
            [high, low] => Some((digit(*high)? * 16 + digit(*low)?) as u8),
            _ => None,
        })
        .collect()
}
