//! One institution's month: what it lent and used, with whom, what was disputed, granted and paid, and where it stands.
use super::{
    netting::{Age, Netting},
    reference,
    time::{Month, rfc3339},
};
use crate::{
    book::Entry,
    evidence::remains,
    note::{Note, NoteError},
};
use karez_core::{
    id::{Institution, RecordId},
    key::{PublicKey, SchedulerId, SecretKey},
    money::{Account, PostingKind},
    records::{Payment, RateCard, Receipt, Signed},
    unit::{Credits, DeviceMillis, UtcMillis},
};
use std::collections::{BTreeMap, HashMap};

const FORM: &str = "karez-statement/2";
/// That of statements of before: without the reference unit.
const FORM_BEFORE: &str = "karez-statement/1";
const SIGNER: &str = "karez-statement/";

/// What went from a provider to a user's institution.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Flow {
    /// Receipts.
    pub receipts: u64,
    /// Device time billed.
    pub billed: DeviceMillis,
    /// Credits paid.
    pub credits: Credits,
    /// Of them, refunded by rulings within the month.
    pub refunded: Credits,
    /// The same device time at the standard rates; device classes that no card knows count for nothing.
    pub standard: Credits,
    /// The same device time on the reference device, as far as machines were measured ([`reference`]).
    pub reference: DeviceMillis,
    /// Receipts that bill time of machines that were not.
    pub unmeasured: u64,
}

/// One institution's month.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statement {
    /// Whose ledger it is computed from.
    pub scheduler: SchedulerId,
    /// Of how many entries, and with which root.
    pub entries: u64,
    /// The tree's root over them.
    pub root: crate::tree::TreeHash,
    /// Which institution.
    pub institution: Institution,
    /// Which month.
    pub month: Month,
    /// What it lent, by user's institution.
    pub lent: BTreeMap<Institution, Flow>,
    /// What its users used, by provider.
    pub used: BTreeMap<Institution, Flow>,
    /// Its account when the month began.
    pub opening: i64,
    /// And when it ended.
    pub closing: i64,
    /// Given as grants, less what came back.
    pub granted: i64,
    /// Paid by it to others outside the ledger, less what it was paid.
    pub paid: i64,
    /// Frozen at the end of the month by disputes over what it lent.
    pub frozen: Credits,
    /// Net of all lending and use among institutions up to the end of the month; under zero: it owes.
    pub net: i128,
    /// How old what it owes is.
    pub age: Age,
    /// Version of the standard rates at the end of the month; 0: none.
    pub rate_card: u32,
}

/// Collects entries, one by one, in order.
#[derive(Debug)]
pub struct StatementBuilder {
    institution: Institution,
    month: Month,
    statement: Statement,
    netting: Netting,
    card: Option<RateCard>,
    /// Of open disputes: whose receipt it was.
    disputed: HashMap<RecordId, (Institution, Institution, Credits)>,
}

impl StatementBuilder {
    /// For one institution and month.
    pub fn new(institution: Institution, month: Month) -> Self {
        let zero = SchedulerId(PublicKey([0; 32]));
        Self {
            statement: Statement {
                scheduler: zero,
                entries: 0,
                root: crate::tree::empty_root(),
                institution: institution.clone(),
                month,
                lent: BTreeMap::new(),
                used: BTreeMap::new(),
                opening: 0,
                closing: 0,
                granted: 0,
                paid: 0,
                frozen: Credits::ZERO,
                net: 0,
                age: Age::default(),
                rate_card: 0,
            },
            institution,
            month,
            netting: Netting::default(),
            card: None,
            disputed: HashMap::new(),
        }
    }

    /// Takes the next entry, which was verified.
    pub fn take(&mut self, entry: &Entry) {
        let within = self.month.contains(entry.at);
        if entry.at >= self.month.end() {
            return;
        }
        let own = Account::Institution(self.institution.clone());
        let leg = |account: &Account| {
            let found = entry.posting.legs.iter().find(|(a, _)| a == account);
            found.map_or(0, |(_, leg)| *leg)
        };
        let moved = leg(&own);
        if !within {
            self.statement.opening += moved;
        }
        self.statement.closing += moved;
        match entry.posting.kind {
            PostingKind::Settle => self.settle(entry, within),
            PostingKind::Dispute => self.dispute(entry),
            PostingKind::Ruling => self.ruling(entry, within),
            PostingKind::Grant | PostingKind::Expire if within => self.statement.granted -= moved,
            PostingKind::Payment => self.payment(entry, within),
            PostingKind::Rates => {
                let card = entry.posting.evidence.first();
                if let Some(card) = card.and_then(|bytes| Signed::<RateCard>::open(bytes).ok()) {
                    self.statement.rate_card = card.version;
                    self.card = Some(card.into_inner());
                }
            }
            _ => {}
        }
    }

    /// The flows between two institutions that concern this one.
    fn flows(&mut self, user: &Institution, provider: &Institution) -> Vec<&mut Flow> {
        let mut out = Vec::new();
        if *provider == self.institution {
            out.push(self.statement.lent.entry(user.clone()).or_default());
        }
        if *user == self.institution {
            out.push(self.statement.used.entry(provider.clone()).or_default());
        }
        out
    }

    fn settle(&mut self, entry: &Entry, within: bool) {
        // The gist has all that sums need, whether the records are still there or not.
        let Some(settled) = remains(&entry.posting, &entry.gist) else {
            return;
        };
        let (user, provider) = (&settled.user_institution, &settled.institution);
        self.netting.used(entry.at, user, provider, settled.credits.0);
        if !within {
            return;
        }
        let rate = self
            .card
            .as_ref()
            .and_then(|card| card.rate(&settled.device_class));
        let standard = rate
            .and_then(|rate| rate.bill(settled.billed))
            .unwrap_or(Credits::ZERO);
        let reference = reference::reference_time(settled.benchmark.as_ref(), settled.billed);
        for flow in self.flows(user, provider) {
            flow.receipts += 1;
            flow.billed = flow.billed.saturating_add(settled.billed);
            flow.credits = flow.credits.saturating_add(settled.credits);
            flow.standard = flow.standard.saturating_add(standard);
            match reference {
                Some(ms) => flow.reference = flow.reference.saturating_add(ms),
                None => flow.unmeasured += u64::from(settled.billed.0 > 0),
            }
        }
    }

    fn dispute(&mut self, entry: &Entry) {
        let receipt = entry.posting.evidence.get(1);
        let Some(receipt) = receipt.and_then(|bytes| Signed::<Receipt>::open(bytes).ok()) else {
            return;
        };
        let (user, provider) = (receipt.user_institution.clone(), receipt.node_institution.clone());
        self.disputed
            .insert(receipt.id(), (user, provider, receipt.credits));
    }

    fn ruling(&mut self, entry: &Entry, within: bool) {
        let [(Account::Disputed(receipt), _), (_, refund), _] = entry.posting.legs.as_slice() else {
            return;
        };
        let Some((user, provider, _)) = self.disputed.remove(receipt) else {
            return;
        };
        let refund = u64::try_from(*refund).unwrap_or(0);
        self.netting.used(entry.at, &provider, &user, refund);
        if within {
            for flow in self.flows(&user, &provider) {
                flow.refunded = flow.refunded.saturating_add(Credits(refund));
            }
        }
    }

    fn payment(&mut self, entry: &Entry, within: bool) {
        let payment = entry.posting.evidence.first();
        let Some(payment) = payment.and_then(|bytes| Signed::<Payment>::open(bytes).ok()) else {
            return;
        };
        let (payer, payee, credits) = (&payment.payer, &payment.payee, payment.credits);
        self.netting.paid(entry.at, payer, payee, credits.0);
        let amount = credits.leg().unwrap_or(i64::MAX);
        if within && *payer == self.institution {
            self.statement.paid = self.statement.paid.saturating_add(amount);
        }
        if within && *payee == self.institution {
            self.statement.paid = self.statement.paid.saturating_sub(amount);
        }
    }

    /// The statement, from the ledger of which this is the end.
    pub fn finish(self, head: &crate::head::Head) -> (Statement, Netting) {
        let end = self.month.end();
        let frozen = self
            .disputed
            .values()
            .filter(|(_, provider, _)| *provider == self.institution);
        let statement = Statement {
            scheduler: head.scheduler,
            entries: head.size,
            root: head.root,
            frozen: frozen.fold(Credits::ZERO, |sum, (.., credits)| sum.saturating_add(*credits)),
            net: self.netting.position(&self.institution),
            // The last moment of the month, so that a debt of its first day is not a day too old.
            age: self.netting.age(&self.institution, UtcMillis(end.0 - 1)),
            ..self.statement
        };
        (statement, self.netting)
    }
}

/// Micro-credits as credits with a sign.
fn credits(micro: i128) -> String {
    let sign = if micro < 0 { "-" } else { "" };
    let micro = micro.unsigned_abs();
    format!("{sign}{}.{:06}", micro / 1_000_000, micro % 1_000_000)
}

impl Statement {
    /// As text, one way only, so that two who compute it get the same bytes.
    pub fn text(&self) -> String {
        self.text_in(FORM)
    }

    fn text_in(&self, form: &str) -> String {
        let mut out = format!(
            "{form}\nledger {}\nentries {} root {}\ninstitution {}\nmonth {} (UTC)\nperiod {} to {}\n",
            self.scheduler,
            self.entries,
            self.root,
            self.institution,
            self.month,
            rfc3339(self.month.start()),
            rfc3339(self.month.end()),
        );
        for (title, flows) in [("lent to", &self.lent), ("used of", &self.used)] {
            for (name, flow) in flows {
                out += &format!(
                    "{title} {name}: receipts {} device-ms {} credits {} refunded {} standard {}",
                    flow.receipts, flow.billed.0, flow.credits, flow.refunded, flow.standard
                );
                if form != FORM_BEFORE {
                    let (ms, unmeasured) = (flow.reference.0, flow.unmeasured);
                    out += &format!(" reference-ms {ms} unmeasured {unmeasured}");
                }
                out.push('\n');
            }
        }
        if form != FORM_BEFORE {
            out += &format!("reference unit {}\n", reference::UNIT);
        }
        out += &format!("rate card {}\n", self.rate_card);
        for (what, micro) in [
            ("account at start", i128::from(self.opening)),
            ("granted, less returned", i128::from(self.granted)),
            ("paid, less received", i128::from(self.paid)),
            ("account at end", i128::from(self.closing)),
            ("frozen by disputes", i128::from(self.frozen.0)),
            ("net of lending and use", self.net),
            ("owed up to 30 days", i128::from(self.age.current)),
            ("owed 31 to 60 days", i128::from(self.age.over_30)),
            ("owed 61 to 90 days", i128::from(self.age.over_60)),
            ("owed over 90 days", i128::from(self.age.over_90)),
        ] {
            out += &format!("{what} {}\n", credits(micro));
        }
        out
    }

    /// As CSV, a line per counterpart and direction; credits as decimal numbers.
    pub fn csv(&self) -> String {
        let mut out = String::from(
            "month,institution,direction,counterpart,receipts,device_ms,credits,refunded,standard_value,reference_unit,\
             reference_ms,unmeasured_receipts\n",
        );
        for (direction, flows) in [("lent", &self.lent), ("used", &self.used)] {
            for (name, flow) in flows {
                out += &format!(
                    "{},{},{direction},{name},{},{},{},{},{},{},{},{}\n",
                    self.month,
                    self.institution,
                    flow.receipts,
                    flow.billed.0,
                    flow.credits,
                    flow.refunded,
                    flow.standard,
                    reference::UNIT,
                    flow.reference.0,
                    flow.unmeasured
                );
            }
        }
        out
    }

    /// The text as a signed note.
    pub fn sign(&self, secret: &SecretKey) -> Note {
        let name = format!("{SIGNER}{}", PublicKey::of(secret));
        Note::sign(self.text(), &name, secret)
    }

    /// Is `note` this statement, signed by `key`?
    pub fn is_signed(&self, note: &Note, key: &PublicKey) -> Result<bool, NoteError> {
        note.verify(&format!("{SIGNER}{key}"), key)?;
        Ok(note.text() == self.as_in(note.text()))
    }

    /// As [`Self::text`], in the form that another statement has.
    pub fn as_in(&self, other: &str) -> String {
        match other.lines().next() {
            Some(FORM_BEFORE) => self.text_in(FORM_BEFORE),
            _ => self.text(),
        }
    }
}
