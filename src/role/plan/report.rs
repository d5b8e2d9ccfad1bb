//! The plan as text and as JSON.

use std::fmt::Write as _;

use serde::Serialize;

use super::advice::{Change, Impossible, Remedy};
use super::cost::{self, Item, total};
use super::scenario::{Index, Queue, Scenario, Stage};
use super::text::{amount, dollars, time};
use super::timeline::{Freshness, Phase, Timeline};

/// Lines of the table of workers over time.
const LINES: usize = 9;

/// Changes of the number of workers that have lines of their own in it.
const MAX_CHANGES: usize = 8;

/// A part that costs more than this of all is worth a remark.
const DEAR: f64 = 0.25;

/// Everything that a plan says.
pub(super) struct Report {
    pub(super) scenario: Scenario,
    pub(super) timeline: Timeline,
    pub(super) deadline: Option<f64>,
    /// None without a deadline.
    pub(super) remedy: Option<Result<Remedy, Impossible>>,
    pub(super) costs: Vec<Item>,
    pub(super) remedy_costs: Option<Vec<Item>>,
    /// Where the rate of a worker comes from.
    pub(super) rate_source: &'static str,
    /// The database, and that of the remedy.
    pub(super) database: String,
    pub(super) remedy_database: Option<String>,
    pub(super) region: String,
    /// What to know of the prices.
    pub(super) price_note: String,
}

impl Report {
    /// Whether the deadline holds as planned; none without a deadline.
    pub(super) fn holds(&self) -> Option<bool> {
        let deadline = self.deadline?;
        Some(self.timeline.drained.is_some_and(|drained| drained <= deadline))
    }

    /// The report for people.
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        self.write(&mut text).unwrap_or_default();
        text
    }

    fn write(&self, to: &mut String) -> std::fmt::Result {
        self.write_head(to)?;
        self.write_verdict(to)?;
        self.write_phases(to)?;
        self.write_workers(to)?;
        self.write_freshness(to)?;
        self.write_remedy(to)?;
        self.write_costs(to)
    }

    fn write_head(&self, to: &mut String) -> std::fmt::Result {
        let Scenario { scaling, worker_rate, startup, .. } = &self.scenario;
        writeln!(
            to,
            "{} rows, loaded at {} rows/s, with {} edits a second",
            amount(self.scenario.records),
            amount(self.scenario.load_rate),
            self.scenario.edits
        )?;
        let count = if scaling.least == scaling.most {
            format!("{}", scaling.least)
        } else {
            format!("{} to {}", scaling.least, scaling.most)
        };
        writeln!(
            to,
            "  workers   {count}, {} rows/s each ({}); a new one works after {}",
            amount(*worker_rate),
            self.rate_source,
            time(*startup)
        )?;
        writeln!(to, "  relays    {}", self.scenario.relays)?;
        let queue = match self.scenario.queue {
            Queue::Pgmq => "pgmq".into(),
            Queue::Sqs { queues } => format!("SQS, {queues} for the bulk lane"),
        };
        writeln!(to, "  queue     {queue}, {} changes in a message of a load", self.scenario.pack)?;
        let index = match self.scenario.index {
            Index::Pgvector { rate } => format!("pgvector, takes {} rows/s", amount(rate)),
            Index::Pinecone { namespaces, wire_bytes } => {
                format!(
                    "Pinecone, namespaces: {namespaces}, {} bytes a record in a request",
                    amount(wire_bytes)
                )
            }
        };
        writeln!(to, "  index     {index}")?;
        writeln!(to, "  database  {}, takes {} rows/s", self.database, amount(self.scenario.database_rate))
    }

    fn write_verdict(&self, to: &mut String) -> std::fmt::Result {
        let Some(drained) = self.timeline.drained else {
            return writeln!(
                to,
                "\nThe load is never searchable as a whole: after {} {} of {} changes still wait. Edits take what the parts can do.",
                time(self.timeline.duration()),
                amount(self.timeline.points.last().map_or(0.0, |point| point.amounts.backlog())),
                amount(self.scenario.records)
            );
        };
        let rate = self.scenario.records / drained.max(1e-9);
        write!(to, "\nAll rows are searchable after {} ({} rows/s).", time(drained), amount(rate))?;
        match self.deadline {
            Some(deadline) if drained <= deadline => {
                writeln!(
                    to,
                    " The deadline of {} holds, with {} to spare.",
                    time(deadline),
                    time(deadline - drained)
                )
            }
            Some(deadline) => {
                writeln!(to, " The deadline of {} is missed by {}.", time(deadline), time(drained - deadline))
            }
            None => writeln!(to),
        }
    }

    fn write_phases(&self, to: &mut String) -> std::fmt::Result {
        writeln!(to, "\nWhat limits the flow\n  {:<14}{:<14}{:>11}  by", "from", "to", "rows/s")?;
        for Phase { from, to: end, limit, rate } in self.timeline.phases() {
            writeln!(to, "  {:<14}{:<14}{:>11}  {}", time(from), time(end), amount(rate), limit.name())?;
        }
        if let Some(useful) = self.useful_workers()
            && useful < self.timeline.most_workers()
        {
            let most = self.timeline.most_workers();
            writeln!(to, "  More than {useful} workers add nothing here; up to {most} run.")?;
        }
        Ok(())
    }

    /// With how many workers the next part becomes the limit.
    fn useful_workers(&self) -> Option<u32> {
        let others = self.scenario.ceilings(f64::INFINITY).into_iter().map(|(_, rate)| rate);
        let requests = self.scenario.request_ceiling(0.0);
        let least = others.chain(requests).fold(f64::INFINITY, f64::min);
        least.is_finite().then(|| (least / self.scenario.worker_rate).ceil() as u32)
    }

    fn write_workers(&self, to: &mut String) -> std::fmt::Result {
        writeln!(
            to,
            "\nWorkers over time\n  {:<14}{:>8}{:>10}{:>16}{:>7}{:>11}{:>16}  limit",
            "at", "working", "starting", "searchable", "", "rows/s", "waiting"
        )?;
        for row in self.rows(LINES) {
            let part = 100.0 * row.loaded / self.scenario.records;
            writeln!(
                to,
                "  {:<14}{:>8}{:>10}{:>16}{:>6.1}%{:>11}{:>16}  {}",
                time(row.at_s),
                row.workers,
                row.starting,
                amount(row.searchable),
                part,
                amount(row.rows_per_s),
                amount(row.waiting),
                row.limit.name()
            )?;
        }
        Ok(())
    }

    fn write_freshness(&self, to: &mut String) -> std::fmt::Result {
        let Some(Freshness { p50, p99, worst, spilled }) = self.timeline.freshness(&self.scenario) else {
            return Ok(());
        };
        write!(
            to,
            "\nEdits are searchable after {} (median), {} (99 %), {} (worst).",
            time(p50),
            time(p99),
            time(worst)
        )?;
        if spilled > 0.0005 {
            write!(
                to,
                " The live lane is full for {:.1} % of them: these wait behind the load.",
                100.0 * spilled
            )?;
        }
        writeln!(to)
    }

    fn write_remedy(&self, to: &mut String) -> std::fmt::Result {
        let (Some(remedy), Some(deadline)) = (&self.remedy, self.deadline) else { return Ok(()) };
        let remedy = match remedy {
            Ok(remedy) => remedy,
            Err(reason) => return writeln!(to, "\nThe deadline cannot hold: {reason}."),
        };
        let fewest = self.holds() == Some(true);
        let heading =
            if fewest { "The fewest with which the deadline holds" } else { "To hold the deadline" };
        writeln!(to, "\n{heading}")?;
        for Change { part, from, to: wanted, reason } in &remedy.changes {
            writeln!(to, "  {part:<14}{} -> {}  {reason}", amount(*from), amount(*wanted))?;
        }
        if let Some(database) = &self.remedy_database {
            writeln!(to, "  {:<14}{database}", "database")?;
        }
        let start = if remedy.from_start { ", all from the start" } else { "" };
        writeln!(to, "  {:<14}up to {}{start}", "workers", amount(f64::from(remedy.workers)))?;
        let drained = remedy.timeline.drained.unwrap_or(deadline);
        writeln!(to, "  Then all rows are searchable after {}.", time(drained))
    }

    fn write_costs(&self, to: &mut String) -> std::fmt::Result {
        writeln!(
            to,
            "\nCost in US dollars, {} (not included: serve, logs, traffic, backups, the proof)\n  {:<18}{:>14}{:>16}",
            self.region, "", "for the load", "a month after"
        )?;
        for item in &self.costs {
            writeln!(
                to,
                "  {:<18}{:>14}{:>16}  {}",
                item.part,
                dollars(item.load_usd),
                dollars(item.month_usd),
                item.quantity
            )?;
        }
        let (load, month) = total(&self.costs);
        writeln!(to, "  {:<18}{:>14}{:>16}", "total", dollars(load), dollars(month))?;
        let asking = self.costs.iter().find(|item| item.part == cost::FRESHNESS);
        if asking.is_some_and(|item| item.load_usd > DEAR * load || item.month_usd > DEAR * month) {
            let why = "each query costs a read unit for each GB of the namespace";
            writeln!(to, "  {} is dear: {why}. Raise index.freshness_sample_s.", cost::FRESHNESS)?;
        }
        if let Some(costs) = &self.remedy_costs {
            let (load, month) = total(costs);
            writeln!(to, "  {:<18}{:>14}{:>16}", "for the deadline", dollars(load), dollars(month))?;
        }
        writeln!(to, "  {}", self.price_note)
    }

    /// The state at even distances, and where the number of workers changes.
    pub(super) fn rows(&self, count: usize) -> Vec<Row> {
        let duration = self.timeline.duration();
        let steps = count.max(2) - 1;
        let mut times: Vec<f64> = (0..=steps).map(|nth| duration * nth as f64 / steps as f64).collect();
        let changes: Vec<f64> = self
            .timeline
            .points
            .windows(2)
            .filter(|pair| pair[0].workers != pair[1].workers)
            .map(|pair| pair[1].at)
            .collect();
        times.extend(changes.iter().step_by(changes.len().div_ceil(MAX_CHANGES).max(1)));
        times.sort_by(f64::total_cmp);
        times.dedup();
        times.into_iter().filter_map(|at| self.row(at)).collect()
    }

    fn row(&self, at: f64) -> Option<Row> {
        let point = self.timeline.point_at(at)?;
        let amounts = point.amounts;
        let searchable = self.timeline.done_at(at);
        let edits = amounts.done_live + amounts.spilled + point.live_rate * (at - point.at);
        Some(Row {
            at_s: at,
            workers: point.workers,
            starting: point.starting,
            searchable,
            loaded: (searchable - edits).clamp(0.0, self.scenario.records),
            rows_per_s: point.rate,
            waiting: amounts.backlog(),
            limit: point.limit,
        })
    }

    /// The report for programs.
    pub(super) fn json(&self) -> serde_json::Result<String> {
        let finite = |seconds: f64| seconds.is_finite().then_some(seconds);
        let freshness = self.timeline.freshness(&self.scenario);
        let found = self.remedy.as_ref().and_then(|remedy| remedy.as_ref().ok());
        let (load_usd, month_usd) = total(&self.costs);
        let value = serde_json::json!({
            "records": self.scenario.records,
            "edits_per_second": self.scenario.edits,
            "worker_rate": self.scenario.worker_rate,
            "deadline_s": self.deadline,
            "drained_s": self.timeline.drained,
            "holds": self.holds(),
            "most_workers": self.timeline.most_workers(),
            "limits": self.timeline.phases().iter().map(|phase| serde_json::json!({
                "from_s": phase.from, "to_s": phase.to, "limit": phase.limit, "rows_per_s": phase.rate,
            })).collect::<Vec<_>>(),
            "decisions": self.timeline.decisions.iter().map(|decided| serde_json::json!({
                "at_s": decided.at, "from": decided.decision.current, "to": decided.decision.desired,
                "reason": decided.decision.to_string(),
            })).collect::<Vec<_>>(),
            "freshness_s": freshness.map(|freshness| serde_json::json!({
                "p50": finite(freshness.p50), "p99": finite(freshness.p99), "worst": finite(freshness.worst),
                "behind_the_load": freshness.spilled,
            })),
            "remedy": found.map(|remedy| serde_json::json!({
                "changes": remedy.changes,
                "workers": remedy.workers,
                "from_start": remedy.from_start,
                "drained_s": remedy.timeline.drained,
                "database": self.remedy_database,
            })),
            "impossible": self.remedy.as_ref().and_then(|remedy| remedy.as_ref().err()),
            "cost": {
                "region": self.region, "parts": self.costs, "load_usd": load_usd, "month_usd": month_usd,
                "note": self.price_note,
            },
            "remedy_cost": self.remedy_costs.as_ref().map(|costs| {
                let (load_usd, month_usd) = total(costs);
                serde_json::json!({ "parts": costs, "load_usd": load_usd, "month_usd": month_usd })
            }),
            "timeline": self.rows(101),
        });
        serde_json::to_string(&value)
    }
}

/// The state at one time.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Row {
    pub(super) at_s: f64,
    pub(super) workers: u32,
    pub(super) starting: u32,
    /// Rows of the load and edits.
    pub(super) searchable: f64,
    /// Rows of the load.
    pub(super) loaded: f64,
    pub(super) rows_per_s: f64,
    pub(super) waiting: f64,
    pub(super) limit: Stage,
}
