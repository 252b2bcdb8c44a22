//! The books of all schedulers, kept a second time: every posting in the ledger's own book, which checks the
//! papers, and in plain sums beside it, which check the book.
use super::{Checker, Rule};
use karez_core::{
    id::{JobId, LeaseKey},
    key::SchedulerId,
    money::{Account, Accounts, Posting, PostingKind},
    records::{Flag, Lease, Outcome, Receipt, Signed, Usage},
    unit::{Credits, DeviceMillis, UtcMillis},
};
use karez_ledger::{Book, Entry};

/// The book of one scheduler.
pub(super) struct Side {
    pub(super) id: SchedulerId,
    pub(super) book: Book,
    entries: Vec<Entry>,
    /// Kept beside the book, by the plain sum of the legs.
    pub(super) accounts: Accounts,
    /// All legs that ever moved, summed: zero, or money was made.
    sum: i128,
}

impl Side {
    pub(super) fn new(id: SchedulerId) -> Self {
        Self {
            id,
            book: Book::new(id),
            entries: Vec::new(),
            accounts: Accounts::default(),
            sum: 0,
        }
    }
}

impl Checker {
    pub(super) fn posted(&mut self, s: usize, at: UtcMillis, posting: &Posting) {
        let side = &mut self.sides[s];
        let mut broken = Vec::new();
        match side.book.append(at, posting.clone()) {
            Ok(entry) if self.keep_books => side.entries.push(entry),
            Ok(_) => {}
            Err(error) => broken.push(format!("the book refuses a {:?}: {error}", posting.kind)),
        }
        if let Err(error) = side.accounts.apply(posting) {
            broken.push(format!("the accounts refuse a {:?}: {error}", posting.kind));
        }
        let sum: i128 = posting.legs.iter().map(|(_, leg)| i128::from(*leg)).sum();
        side.sum += sum;
        if sum != 0 || side.sum != 0 {
            broken.insert(0, format!("a {:?} makes or loses money", posting.kind));
        }
        for (account, _) in &posting.legs {
            let balance = side.accounts.balance(account);
            if balance < 0 && *account != Account::Federation {
                broken.push(format!("{account} stands at {balance}"));
            }
        }
        self.judged(Rule::Conserved);
        if let Some(rule) = broken.into_iter().next() {
            return self.fail(rule);
        }
        match posting.kind {
            PostingKind::Reserve => {
                for (account, leg) in &posting.legs {
                    if let Account::Escrow(job) = account {
                        let amount = u64::try_from(*leg).unwrap_or(0);
                        if self.reserved.insert(*job, amount).is_some() {
                            self.fail(format!("{job:?} reserved twice"));
                        }
                    }
                }
            }
            PostingKind::Settle => self.settle(s, posting),
            PostingKind::Release => {
                for (account, _) in &posting.legs {
                    let left = self.sides[s].accounts.balance(account);
                    if matches!(account, Account::Escrow(_)) && left != 0 {
                        self.fail(format!("{account} was released but not emptied"));
                    }
                }
            }
            // A grant, or whatever a ledger learns later: the sums above judge it.
            _ => {}
        }
    }

    fn settle(&mut self, s: usize, posting: &Posting) {
        self.settlements += 1;
        self.judged(Rule::BilledOnce);
        let [_, lease, _, .., usage, receipt] = posting.evidence.as_slice() else {
            return self.fail("a settlement lacks its papers".into());
        };
        let papers = (
            Signed::<Lease>::open(lease),
            Signed::<Usage>::open(usage),
            Signed::<Receipt>::open(receipt),
        );
        let (Ok(lease), Ok(usage), Ok(receipt)) = papers else {
            return self.fail("a settlement's papers cannot be read".into());
        };
        let key = lease.key();
        let done = usage.outcome == Outcome::Done && !receipt.flags.contains(&Flag::NotDone);
        self.receipts.insert(receipt.id());
        let entry = self.settled.entry((key.job, key.part)).or_default();
        if key.fence <= entry.last {
            let last = entry.last;
            self.fail(format!("{key} was settled after fence {last}"));
        } else if let Some(before) = entry.done {
            self.fail(format!("{key} was settled after {before} was done"));
        } else {
            entry.last = key.fence;
            if done {
                entry.done = Some(key.fence);
            }
        }
        let billed = self.billed.entry(key.job).or_default();
        *billed += receipt.credits.0;
        let (billed, reserved) = (*billed, self.reserved.get(&key.job).copied().unwrap_or(0));
        if billed > reserved {
            self.fail(format!(
                "{:?} was billed {billed} of {reserved} reserved",
                key.job
            ));
        }
        if !done && receipt.credits > Credits::ZERO {
            self.fail(format!("{key} was billed though it did not finish"));
        }
        if lease.scheduler != self.sides[s].id {
            self.fail(format!("{key} was billed by another scheduler than leased it"));
        }
        if let Err(rule) = self.settle_true(&key, &lease, &usage, &receipt, done) {
            self.fail(format!("{key}: {rule}"));
        }
        let moved = posting.legs.iter().map(|(_, leg)| leg.unsigned_abs()).max();
        if moved != Some(receipt.credits.0) {
            self.fail(format!("{key}: the posting moves other than the receipt says"));
        }
        if done {
            let institution = receipt.node_institution.clone();
            *self.earned.entry(institution).or_default() += receipt.credits.0;
            self.device_ms_billed += receipt.billed.0;
        }
    }

    /// What was settled is what was asked for and, on an honest machine, what really happened.
    fn settle_true(
        &self,
        key: &LeaseKey,
        lease: &Lease,
        usage: &Usage,
        receipt: &Receipt,
        done: bool,
    ) -> Result<(), String> {
        let (asked, rate) = self.asked.get(key).ok_or("settled, but nobody asked for it")?;
        if *asked != lease.node || lease.rate > *rate {
            return Err("settled for another node or price than was asked".into());
        }
        let n = self
            .index_of(&lease.node)
            .ok_or("settled for a node nobody knows")?;
        let node = &self.nodes[n];
        if lease.institution != node.institution || receipt.node_institution != node.institution {
            return Err("another institution was paid".into());
        }
        let bill = lease.rate.bill(receipt.billed).unwrap_or(Credits(u64::MAX));
        if receipt.credits > bill || receipt.billed > lease.device_ms_max {
            return Err("the receipt bills more than time and lease allow".into());
        }
        if done && usage.result.is_none() {
            return Err("done without a result".into());
        }
        if !node.honest {
            return Ok(());
        }
        if self.leases.get(key).is_none_or(|seen| seen.node != n) {
            return Err("settled, but its node never granted it".into());
        }
        if done {
            let run = self
                .executions
                .get(&(n, *key))
                .and_then(|e| e.ended.map(|end| (e.began, end)));
            let Some((began, (ended, true))) = run else {
                return Err("settled as done, but no worker finished it".into());
            };
            let milli = (ended - began) * u64::from(lease.devices.milli());
            let ran = milli.div_ceil(1_000);
            if receipt.billed > DeviceMillis(ran) {
                return Err(format!("billed {} ms, ran {ran} ms", receipt.billed.0));
            }
            if usage
                .result
                .is_some_and(|result| !self.results.contains(&result.digest))
            {
                return Err("settled as done, but its result never reached the scheduler".into());
            }
        }
        Ok(())
    }

    /// Reads the whole book of every scheduler anew, from its first entry: with every signature, or trusting those. Nothing
    /// where the books were not kept.
    pub fn audit(&mut self, signatures: bool) {
        if !self.keep_books {
            return;
        }
        for s in 0..self.sides.len() {
            if let Err(rule) = self.audit_one(s, signatures) {
                self.fail(rule);
            }
        }
    }

    fn audit_one(&self, s: usize, signatures: bool) -> Result<(), String> {
        let side = &self.sides[s];
        let mut book = Book::new(side.id);
        for entry in &side.entries {
            let read = Entry::decode(&entry.encode()).map_err(|e| format!("entry {}: {e}", entry.seq))?;
            let replayed = if signatures {
                book.replay(&read)
            } else {
                book.recall(&read)
            };
            replayed.map_err(|e| format!("the book read anew breaks at entry {}: {e}", entry.seq))?;
        }
        if book.head() != side.book.head() || book.accounts() != side.book.accounts() {
            return Err("the book read anew is another book".into());
        }
        Ok(())
    }

    /// At the end: what each scheduler believes of its accounts, and that no escrow outlives its job.
    pub(super) fn money_at_rest(&mut self, s: usize, believed: &Accounts) {
        let side = &self.sides[s];
        let differ = *believed != side.accounts || *side.book.accounts() != side.accounts;
        let left = side
            .accounts
            .iter()
            .find(|(account, balance)| {
                *balance != 0 && matches!(account, Account::Escrow(job) if self.has_ended(job))
            })
            .map(|(account, balance)| format!("{account} still holds {balance} though its job has ended"));
        let made = side.accounts.sum() != 0;
        self.judged(Rule::Conserved);
        if differ {
            self.fail("the scheduler's accounts are not those of its postings".into());
        }
        if made {
            self.fail("the balances do not sum to zero".into());
        }
        if let Some(rule) = left {
            self.fail(rule);
        }
    }

    /// What a job was billed so far.
    pub fn billed(&self, job: &JobId) -> u64 {
        self.billed.get(job).copied().unwrap_or(0)
    }
}
