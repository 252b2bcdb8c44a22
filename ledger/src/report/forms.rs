//! Usage in the forms that other systems read, a record per settled lease. Fields: `docs/accounting.md`.
use super::{
    reference,
    settlement::{Pseudonyms, Settlement},
    time::{Month, rfc3339},
};
use crate::book::Entry;
use karez_core::{
    id::Institution,
    money::PostingKind,
    records::{Outcome, RateCard, Signed, Verified},
    unit::{Credits, DeviceMillis, Millis, UtcMillis},
};
use serde_json::json;
use std::{
    fmt,
    io::{self, Write},
    str::FromStr,
};

/// The forms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// OGF Usage Record 2.0, XML (GFD.204).
    Ogf,
    /// APEL job messages, and APEL GPU messages for what GPUs did.
    Apel,
    /// FinOps FOCUS 1.0, CSV.
    Focus,
    /// Records as AUDITOR takes them, a JSON document per line.
    Auditor,
    /// Plain CSV with every meter.
    Csv,
    /// The same as JSON lines.
    Ndjson,
}

impl Form {
    /// Every form with its name.
    pub const ALL: [(&'static str, Self); 6] = [
        ("ogf", Self::Ogf),
        ("apel", Self::Apel),
        ("focus", Self::Focus),
        ("auditor", Self::Auditor),
        ("csv", Self::Csv),
        ("ndjson", Self::Ndjson),
    ];
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::ALL.iter().find(|(_, form)| form == self);
        f.write_str(name.map_or("", |(name, _)| name))
    }
}

impl FromStr for Form {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|(name, _)| *name == text);
        found.map(|(_, form)| *form).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|(name, _)| *name).collect();
            format!("{text:?} is no form: expected one of {}", names.join(", "))
        })
    }
}

/// Writes usage in one form.
pub struct Writer<'a> {
    out: &'a mut dyn Write,
    form: Form,
    names: Pseudonyms,
    month: Option<Month>,
    institution: Option<Institution>,
    card: Option<RateCard>,
    /// What the last record's kind was: APEL groups records of one kind in one message.
    open: Option<&'static str>,
    records: u64,
    dropped: u64,
}

impl<'a> Writer<'a> {
    /// For the settlements of a month (of all time), in which an institution (any) lent or used.
    pub fn begin(
        out: &'a mut dyn Write,
        form: Form,
        names: Pseudonyms,
        month: Option<Month>,
        institution: Option<Institution>,
    ) -> io::Result<Self> {
        match form {
            Form::Ogf => writeln!(
                out,
                "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<ur:UsageRecords \
                 xmlns:ur=\"http://schema.ogf.org/urf/2013/04/urf\">"
            )?,
            Form::Focus => writeln!(out, "{}", FOCUS.join(","))?,
            Form::Csv => writeln!(out, "{}", PLAIN.join(","))?,
            Form::Apel | Form::Auditor | Form::Ndjson => {}
        }
        Ok(Self {
            out,
            form,
            names,
            month,
            institution,
            card: None,
            open: None,
            records: 0,
            dropped: 0,
        })
    }

    /// Takes the next entry, which was verified.
    pub fn take(&mut self, entry: &Entry) -> io::Result<()> {
        if entry.posting.kind == PostingKind::Rates {
            let card = entry.posting.evidence.last();
            let card = card.and_then(|bytes| Signed::<RateCard>::open(bytes).ok());
            self.card = card.map(Verified::into_inner);
        }
        if entry.posting.kind == PostingKind::Settle && entry.dropped.is_some() {
            self.dropped += u64::from(self.month.is_none_or(|month| month.contains(entry.at)));
        }
        let Some(settled) = Settlement::read(&entry.posting) else {
            return Ok(());
        };
        let receipt = &settled.receipt;
        let concerns =
            |name: &Institution| *name == receipt.user_institution || *name == receipt.node_institution;
        if !self.month.is_none_or(|month| month.contains(entry.at))
            || !self.institution.as_ref().is_none_or(concerns)
        {
            return Ok(());
        }
        let row = Row::of(entry, settled, &self.names, self.card.as_ref());
        self.records += 1;
        match self.form {
            Form::Ogf => write!(self.out, "{}", row.ogf()),
            Form::Apel => self.apel(&row),
            Form::Focus => csv(self.out, &row.focus()),
            Form::Auditor => writeln!(self.out, "{}", row.auditor()),
            Form::Csv => csv(self.out, &row.plain()),
            Form::Ndjson => {
                let object: serde_json::Map<String, serde_json::Value> = PLAIN
                    .iter()
                    .map(|key| (*key).to_owned())
                    .zip(row.typed())
                    .collect();
                writeln!(self.out, "{}", serde_json::Value::Object(object))
            }
        }
    }

    fn apel(&mut self, row: &Row) -> io::Result<()> {
        const JOBS: &str = "APEL-individual-job-message: v0.3";
        const GPUS: &str = "APEL-GPU-message: v0.1";
        let mut messages = vec![(JOBS, row.apel_job())];
        if row.settled.gpu() {
            messages.push((GPUS, row.apel_gpu()));
        }
        for (kind, text) in messages {
            if self.open != Some(kind) {
                writeln!(self.out, "{kind}")?;
                self.open = Some(kind);
            }
            writeln!(self.out, "{text}%%")?;
        }
        Ok(())
    }

    /// Settlements of the period whose records were dropped: they are in no form any more.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Writes what ends the file; gives the number of records.
    pub fn finish(self) -> io::Result<u64> {
        if self.form == Form::Ogf {
            writeln!(self.out, "</ur:UsageRecords>")?;
        }
        self.out.flush()?;
        Ok(self.records)
    }
}

/// One field of CSV: quoted where it must be.
fn field(text: &str) -> String {
    if text.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text.to_owned()
    }
}

fn csv(out: &mut dyn Write, fields: &[String]) -> io::Result<()> {
    let line: Vec<String> = fields.iter().map(|text| field(text)).collect();
    writeln!(out, "{}", line.join(","))
}

fn xml(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// The columns of the plain forms.
const PLAIN: [&str; 44] = [
    "entry",
    "posted_at",
    "receipt",
    "usage",
    "lease",
    "order",
    "part",
    "fence",
    "user",
    "user_institution",
    "node",
    "node_institution",
    "work",
    "model",
    "device_class",
    "devices",
    "outcome",
    "started_at",
    "ended_at",
    "device_ms",
    "observed_ms",
    "billed_ms",
    "cpu_core_ms",
    "memory_peak_bytes",
    "memory_byte_seconds",
    "tokens_in",
    "tokens_out",
    "tokens_cached",
    "items",
    "bytes_in",
    "bytes_out",
    "millijoules",
    "method",
    "mono_ms",
    "rate_microcredits_per_hour",
    "microcredits",
    "standard_microcredits",
    "rate_card",
    "flags",
    "disputable_until",
    "benchmark",
    "benchmark_tokens_per_second",
    "reference_unit",
    "reference_ms",
];

/// The columns of FOCUS 1.0, in the order of its names.
const FOCUS: [&str; 43] = [
    "AvailabilityZone",
    "BilledCost",
    "BillingAccountId",
    "BillingAccountName",
    "BillingCurrency",
    "BillingPeriodEnd",
    "BillingPeriodStart",
    "ChargeCategory",
    "ChargeClass",
    "ChargeDescription",
    "ChargeFrequency",
    "ChargePeriodEnd",
    "ChargePeriodStart",
    "CommitmentDiscountCategory",
    "CommitmentDiscountId",
    "CommitmentDiscountName",
    "CommitmentDiscountStatus",
    "CommitmentDiscountType",
    "ConsumedQuantity",
    "ConsumedUnit",
    "ContractedCost",
    "ContractedUnitPrice",
    "EffectiveCost",
    "InvoiceIssuerName",
    "ListCost",
    "ListUnitPrice",
    "PricingCategory",
    "PricingQuantity",
    "PricingUnit",
    "ProviderName",
    "PublisherName",
    "RegionId",
    "RegionName",
    "ResourceId",
    "ResourceName",
    "ResourceType",
    "ServiceCategory",
    "ServiceName",
    "SkuId",
    "SkuPriceId",
    "SubAccountId",
    "SubAccountName",
    "Tags",
];

struct Row {
    entry: u64,
    posted_at: UtcMillis,
    month: Month,
    user: String,
    settled: Settlement,
    standard: Option<Credits>,
}

/// Milliseconds as seconds, up to the next.
fn seconds(ms: u64) -> u64 {
    ms.div_ceil(1000)
}

/// Thousandths as a decimal number.
fn thousandths(milli: u64) -> f64 {
    milli as f64 / 1000.0
}

/// Credits with six decimals.
fn decimal(micro: u64) -> String {
    Credits(micro).to_string()
}

impl Row {
    fn of(entry: &Entry, settled: Settlement, names: &Pseudonyms, card: Option<&RateCard>) -> Self {
        let receipt = &settled.receipt;
        let month = Month::of(entry.at);
        let rate = card.and_then(|card| card.rate(&settled.lease.device_class));
        Self {
            entry: entry.seq,
            posted_at: entry.at,
            month,
            // Of the month in which it was asked for: a job that is settled in two months would otherwise join two names.
            user: names.name(
                receipt.user,
                &receipt.user_institution,
                Month::of(settled.order.issued_at),
            ),
            standard: rate.and_then(|rate| rate.bill(receipt.billed)),
            settled,
        }
    }

    /// What was billed, in the unit that all machines are compared in.
    fn reference(&self) -> Option<DeviceMillis> {
        let Settlement { reading, receipt, .. } = &self.settled;
        reference::reference_time(reading.benchmark.as_ref(), receipt.billed)
    }

    /// How many reference devices one device of the lease is, with six decimals; none where it was not measured.
    fn service_level(&self) -> Option<String> {
        let second = DeviceMillis(1_000_000_000);
        let ms = reference::reference_time(self.settled.reading.benchmark.as_ref(), second)?.0;
        Some(format!("{}.{:06}", ms / 1_000_000_000, ms / 1_000 % 1_000_000))
    }

    fn flags(&self) -> String {
        let flags: Vec<_> = self.settled.receipt.flags.iter().map(|f| f.as_str()).collect();
        flags.join(" ")
    }

    /// In the order of [`PLAIN`].
    fn typed(&self) -> Vec<serde_json::Value> {
        let Settlement {
            order,
            lease,
            reading,
            usage,
            receipt,
        } = &self.settled;
        let m = &usage.meters;
        vec![
            json!(self.entry),
            json!(rfc3339(self.posted_at)),
            json!(receipt.id().to_string()),
            json!(usage.id().to_string()),
            json!(lease.id().to_string()),
            json!(order.id().to_string()),
            json!(lease.part),
            json!(lease.fence),
            json!(self.user),
            json!(receipt.user_institution.as_str()),
            json!(receipt.node.to_string()),
            json!(receipt.node_institution.as_str()),
            json!(order.work.kind().as_str()),
            json!(order.work.model().map(|m| m.digest.to_string())),
            json!(lease.device_class),
            if lease.devices.is_share() {
                json!(f64::from(lease.devices.milli()) / 1_000.0)
            } else {
                json!(lease.devices.count())
            },
            json!(usage.outcome.as_str()),
            json!(rfc3339(usage.started_at)),
            json!(rfc3339(usage.ended_at)),
            json!(m.device_ms.0),
            json!(receipt.observed.0),
            json!(receipt.billed.0),
            json!(m.cpu.0),
            json!(m.memory_peak.0),
            json!(m.memory_byte_seconds),
            json!(m.tokens_in),
            json!(m.tokens_out),
            json!(m.tokens_cached),
            json!(m.items),
            json!(m.bytes_in.0),
            json!(m.bytes_out.0),
            json!(m.millijoules),
            json!(reading.method),
            json!(reading.mono.0),
            json!(lease.rate.0),
            json!(receipt.credits.0),
            json!(self.standard.map(|c| c.0)),
            json!(receipt.rate_card),
            json!(self.flags()),
            json!(rfc3339(receipt.disputable_until)),
            json!(reading.benchmark.as_ref().map(|b| b.version.as_str())),
            json!(reading.benchmark.as_ref().map(|b| thousandths(b.speed.0))),
            json!(self.reference().map(|_| reference::UNIT)),
            json!(self.reference().map(|ms| ms.0)),
        ]
    }

    fn plain(&self) -> Vec<String> {
        let text = |value: serde_json::Value| match value {
            serde_json::Value::String(text) => text,
            serde_json::Value::Null => String::new(),
            other => other.to_string(),
        };
        self.typed().into_iter().map(text).collect()
    }

    fn site(&self) -> &str {
        self.settled.receipt.node_institution.as_str()
    }

    /// What other systems call a site's queue or partition.
    fn queue(&self) -> &str {
        &self.settled.lease.device_class
    }

    fn wall(&self) -> u64 {
        let usage = &self.settled.usage;
        seconds(usage.ended_at.0.saturating_sub(usage.started_at.0))
    }

    fn ogf(&self) -> String {
        let Settlement {
            order,
            lease,
            usage,
            receipt,
            ..
        } = &self.settled;
        let exit = match usage.outcome {
            Outcome::Done => "0",
            _ => "1",
        };
        format!(
            "<ur:UsageRecord><ur:RecordIdentityBlock><ur:RecordId>{record}</ur:RecordId>\
             <ur:CreateTime>{created}</ur:CreateTime><ur:Site>{site}</ur:Site>\
             <ur:Infrastructure ur:infrastructureType=\"grid\">karez</ur:Infrastructure></ur:RecordIdentityBlock>\
             <ur:SubjectIdentityBlock><ur:LocalUserId>{user}</ur:LocalUserId>\
             <ur:LocalGroupId>{group}</ur:LocalGroupId>\
             <ur:GlobalGroupId>{group}</ur:GlobalGroupId></ur:SubjectIdentityBlock>\
             <ur:ComputeUsageBlock><ur:CpuDuration>PT{cpu}S</ur:CpuDuration>\
             <ur:WallDuration>PT{wall}S</ur:WallDuration><ur:StartTime>{start}</ur:StartTime>\
             <ur:EndTime>{end}</ur:EndTime><ur:ExecutionHost><ur:Hostname>{node}</ur:Hostname></ur:ExecutionHost>\
             <ur:HostType>{queue}</ur:HostType><ur:Processors>{devices}</ur:Processors><ur:NodeCount>1</ur:NodeCount>\
             <ur:ExitStatus>{exit}</ur:ExitStatus><ur:Charge>{charge}</ur:Charge></ur:ComputeUsageBlock>\
             <ur:JobUsageBlock><ur:GlobalJobId>{job}</ur:GlobalJobId><ur:LocalJobId>{part}</ur:LocalJobId>\
             <ur:JobName>{kind}</ur:JobName><ur:Queue>{queue}</ur:Queue><ur:Status>{outcome}</ur:Status>\
             </ur:JobUsageBlock>\
             <ur:MemoryUsageBlock><ur:MemoryClass>RAM</ur:MemoryClass>\
             <ur:MemoryResourceCapacityUsed>{memory}</ur:MemoryResourceCapacityUsed></ur:MemoryUsageBlock>\
             </ur:UsageRecord>\n",
            record = receipt.id(),
            created = rfc3339(receipt.issued_at),
            site = self.site(),
            user = self.user,
            group = receipt.user_institution,
            cpu = seconds(usage.meters.cpu.0),
            wall = self.wall(),
            start = rfc3339(usage.started_at),
            end = rfc3339(usage.ended_at),
            node = lease.node,
            queue = xml(self.queue()),
            devices = lease.devices.touched(),
            charge = decimal(receipt.credits.0),
            job = order.id(),
            part = format_args!("{}.{}", lease.part, lease.fence),
            kind = order.work.kind().as_str(),
            outcome = usage.outcome.as_str(),
            memory = usage.meters.memory_peak.0,
        )
    }

    fn apel_job(&self) -> String {
        let Settlement {
            order,
            lease,
            usage,
            receipt,
            ..
        } = &self.settled;
        let level = self.service_level();
        format!(
            "Site: {site}\nSubmitHost: {scheduler}\nMachineName: {node}\nQueue: {queue}\n\
             LocalJobId: {job}.{part}.{fence}\nLocalUserId: {user}\nGlobalUserName: {user}\nVO: {vo}\n\
             WallDuration: {wall}\nCpuDuration: {cpu}\nProcessors: {devices}\nNodeCount: 1\nStartTime: {start}\n\
             EndTime: {end}\nInfrastructureDescription: KAREZ\nInfrastructureType: grid\nMemoryReal: {memory}\n\
             ServiceLevelType: custom\nServiceLevel: {level}\n",
            site = self.site(),
            scheduler = receipt.scheduler,
            node = lease.node,
            queue = self.queue(),
            job = order.id(),
            part = lease.part,
            fence = lease.fence,
            user = self.user,
            vo = receipt.user_institution,
            wall = self.wall(),
            cpu = seconds(usage.meters.cpu.0),
            devices = lease.devices.touched(),
            start = usage.started_at.0 / 1000,
            end = usage.ended_at.0 / 1000,
            memory = usage.meters.memory_peak.0 / 1024,
            // Whoever multiplies by it gets the time of the reference device; by 1, what the clock said.
            level = level.as_deref().unwrap_or("1"),
        )
    }

    fn apel_gpu(&self) -> String {
        let Settlement {
            order,
            lease,
            usage,
            receipt,
            ..
        } = &self.settled;
        format!(
            "MeasurementMonth: {month}\nMeasurementYear: {year}\nAssociatedRecordType: job\n\
             AssociatedRecord: {job}.{part}.{fence}\nGlobalUserName: {user}\nFQAN: {vo}\nSiteName: {site}\n\
             Count: {devices}\nActiveDuration: {active}\nAvailableDuration: {available}\nType: GPU\nModel: {model}\n",
            month = self.month.number(),
            year = self.month.year(),
            job = order.id(),
            part = lease.part,
            fence = lease.fence,
            user = self.user,
            vo = receipt.user_institution,
            site = self.site(),
            devices = lease.devices,
            active = seconds(usage.meters.device_ms.0),
            available = lease.devices.time(Millis(self.wall())).0,
            model = self.settled.device_model(),
        )
    }

    fn auditor(&self) -> serde_json::Value {
        let Settlement {
            order,
            lease,
            usage,
            receipt,
            ..
        } = &self.settled;
        let m = &usage.meters;
        // What a device is worth beside others is told of the times that devices were held.
        let scores = match &self.settled.reading.benchmark {
            Some(b) => json!([{"name": b.version, "value": thousandths(b.speed.0)}]),
            None => json!([]),
        };
        let held = |name: &str, amount: u64| json!({"name": name, "amount": amount, "scores": scores});
        let component = |name: &str, amount: u64| json!({"name": name, "amount": amount, "scores": []});
        let mut components = vec![
            component(
                if self.settled.gpu() { "GPUs" } else { "CPUs" },
                lease.devices.touched().into(),
            ),
            held("DeviceMilliseconds", m.device_ms.0),
            held("BilledMilliseconds", receipt.billed.0),
            component("CpuMilliseconds", m.cpu.0),
            component("MemoryPeakBytes", m.memory_peak.0),
            component("MemoryByteSeconds", m.memory_byte_seconds),
            component("TokensIn", m.tokens_in),
            component("TokensOut", m.tokens_out),
            component("TokensCached", m.tokens_cached),
            component("BytesIn", m.bytes_in.0),
            component("BytesOut", m.bytes_out.0),
            component("MicroCredits", receipt.credits.0),
        ];
        components.extend(m.millijoules.map(|mj| component("Millijoules", mj)));
        json!({
            "record_id": format!("karez-{}", receipt.id()),
            "meta": {
                "site_id": [self.site()],
                "user_id": [self.user],
                "group_id": [receipt.user_institution.as_str()],
                "job_id": [order.id().to_string()],
                "device_class": [self.queue()],
                "work": [order.work.kind().as_str()],
                "outcome": [usage.outcome.as_str()],
            },
            "components": components,
            "start_time": rfc3339(usage.started_at),
            "stop_time": rfc3339(usage.ended_at),
            "runtime": self.wall(),
        })
    }

    /// In the order of [`FOCUS`].
    fn focus(&self) -> Vec<String> {
        let Settlement {
            order,
            lease,
            usage,
            receipt,
            ..
        } = &self.settled;
        let hours = |ms: u64| format!("{:.6}", ms as f64 / 3_600_000.0);
        let cost = decimal(receipt.credits.0);
        let price = decimal(lease.rate.0);
        let list = self.standard.map_or_else(|| cost.clone(), |c| decimal(c.0));
        let list_price = match (self.standard, receipt.billed.0) {
            (Some(standard), ms @ 1..) => {
                let micro = u128::from(standard.0) * 3_600_000 / u128::from(ms);
                decimal(u64::try_from(micro).unwrap_or(u64::MAX))
            }
            _ => price.clone(),
        };
        let (unit, quantity) = ("Hours", hours(receipt.billed.0));
        // A charge period has a length, even where the work took less than a second.
        let start = usage.started_at;
        let end = UtcMillis(usage.ended_at.0.max(start.0 + 1_000));
        let mut tags = json!({
            "work": order.work.kind().as_str(),
            "outcome": usage.outcome.as_str(),
            "user": self.user,
            "receipt": receipt.id().to_string(),
        });
        if let Some(ms) = self.reference() {
            tags["reference_unit"] = json!(reference::UNIT);
            tags["reference_hours"] = json!(hours(ms.0));
        }
        let kind = order.work.kind().as_str();
        let class = &lease.device_class;
        let text = |value: &dyn fmt::Display| value.to_string();
        vec![
            String::new(),
            cost.clone(),
            text(&receipt.user_institution),
            text(&receipt.user_institution),
            // ISO 4217: "no currency is involved". The amounts are credits.
            "XXX".into(),
            rfc3339(self.month.end()),
            rfc3339(self.month.start()),
            "Usage".into(),
            String::new(),
            format!("{kind} on {class}, part {} of {}", lease.part, order.id()),
            "Usage-Based".into(),
            rfc3339(end),
            rfc3339(start),
            String::new(),
            String::new(),
            String::new(),
            String::new(),
            String::new(),
            quantity.clone(),
            unit.into(),
            cost.clone(),
            price,
            cost,
            self.site().into(),
            list,
            list_price,
            "Standard".into(),
            quantity,
            unit.into(),
            self.site().into(),
            self.site().into(),
            String::new(),
            String::new(),
            text(&receipt.node),
            class.clone(),
            if self.settled.gpu() {
                "GPU".into()
            } else {
                "CPU".into()
            },
            "AI and Machine Learning".into(),
            format!("Karez {kind}"),
            class.clone(),
            format!("{class}@{}", lease.rate.0),
            self.user.clone(),
            self.user.clone(),
            tags.to_string(),
        ]
    }
}
