//! `refarch redrive`: lists the dead letters, or queues them again.

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;

use anyhow::bail;
use serde::Serialize;

use crate::backend::{Backends, Database};
use crate::cli;
use crate::config::Settings;
use crate::pipeline::failure;
use crate::pipeline::queue::{DeadLetter, DeadLetters, Reason};

/// Dead letters in memory at a time.
const PAGE: usize = 500;

/// Row ids of a dead letter in the text output.
const SHOWN_IDS: usize = 5;

/// Characters of an undecodable body in the text output.
const SHOWN_BODY_CHARS: usize = 300;

/// The dead letters that were queued again, or would be in a dry run.
#[derive(Debug, Default, Serialize)]
struct RedriveReport {
    /// Number of dead letters.
    redriven: u64,
    /// Number of changes in these dead letters.
    changes: u64,
    /// Requested ids that do not exist.
    missing: Vec<String>,
    /// Whether nothing was changed.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    dry_run: bool,
}

/// Lists the dead letters, or queues some or all of them again.
///
/// # Errors
///
/// Also if a requested id does not exist; the other dead letters are queued again then.
pub async fn run(args: &cli::Redrive, settings: &Settings) -> anyhow::Result<()> {
    super::harness::with_database(settings, async |database: &Database| {
        let backends = Backends::open(&database.postgres, settings).await?;
        let dead_letters = &*backends.queue.dead_letters;
        let outcome = if args.all {
            redrive_everything(dead_letters, args.dry_run).await?
        } else if args.id.is_empty() {
            return list(dead_letters, args.json).await;
        } else {
            named(dead_letters, &args.id, args.dry_run).await?
        };
        let text = if args.json { serde_json::to_string(&outcome)? + "\n" } else { describe(&outcome) };
        super::output::print(text.as_bytes())?;
        if !outcome.missing.is_empty() {
            let named = outcome.missing.join(", ");
            bail!("no dead letter has the id {named}: refarch redrive lists the existing ids");
        }
        Ok(())
    })
    .await
}

/// The dead letters page by page, oldest first.
struct DeadLetterPages<'a> {
    dead_letters: &'a dyn DeadLetters,
    after: Option<String>,
}

impl<'a> DeadLetterPages<'a> {
    fn of(dead_letters: &'a dyn DeadLetters) -> Self {
        Self { dead_letters, after: None }
    }

    /// The next page; none after the last page.
    async fn next(&mut self) -> failure::Result<Option<Vec<DeadLetter>>> {
        let page = self.dead_letters.list(self.after.as_deref(), PAGE).await?;
        let Some(last) = page.last() else { return Ok(None) };
        self.after = Some(last.id.clone());
        Ok(Some(page))
    }
}

async fn list(dead_letters: &dyn DeadLetters, json: bool) -> anyhow::Result<()> {
    let mut pages = DeadLetterPages::of(dead_letters);
    let mut is_first = true;
    while let Some(page) = pages.next().await? {
        let mut text = String::new();
        for letter in page {
            if json {
                text += &serde_json::to_string(&letter)?;
                text.push('\n');
            } else {
                text += if is_first { "" } else { "\n" };
                text += &letter_text(&letter);
            }
            is_first = false;
        }
        super::output::print(text.as_bytes())?;
    }
    if is_first && !json {
        super::output::print(b"no dead letters\n")?;
    }
    Ok(())
}

/// Queues every present dead letter again, up to the one that is the newest now. A change that fails again at
/// once becomes a new dead letter behind this one; without the bound the loop would never end.
async fn redrive_everything(dead_letters: &dyn DeadLetters, dry_run: bool) -> failure::Result<RedriveReport> {
    let mut there = RedriveReport { dry_run: true, ..RedriveReport::default() };
    let mut last = None;
    let mut pages = DeadLetterPages::of(dead_letters);
    while let Some(mut page) = pages.next().await? {
        there.redriven += page.len() as u64;
        there.changes += page.iter().map(|letter| letter.changes).sum::<u64>();
        last = page.pop();
    }
    let Some(last) = last.filter(|_| !dry_run) else {
        return Ok(RedriveReport { dry_run, ..there });
    };
    if let Some(redriven) = dead_letters.redrive_all().await? {
        return Ok(RedriveReport { redriven, changes: there.changes, ..RedriveReport::default() });
    }
    let mut outcome = RedriveReport::default();
    let mut pages = DeadLetterPages::of(dead_letters);
    while let Some(mut page) = pages.next().await? {
        let end = page.iter().position(|letter| letter.id == last.id);
        // Another process may have redriven the last dead letter meanwhile.
        if end.is_none() && page[0].at > last.at {
            break;
        }
        page.truncate(end.map_or(page.len(), |end| end + 1));
        let changes = page.into_iter().map(|letter| (letter.id, letter.changes)).collect();
        redrive_letters(dead_letters, &changes, &mut outcome).await?;
        if end.is_some() {
            break;
        }
    }
    Ok(outcome)
}

/// Queues the dead letters with these ids again.
async fn named(
    dead_letters: &dyn DeadLetters,
    ids: &[String],
    dry_run: bool,
) -> failure::Result<RedriveReport> {
    let mut wanted: HashSet<&str> = ids.iter().map(String::as_str).collect();
    let mut changes = HashMap::new();
    let mut pages = DeadLetterPages::of(dead_letters);
    while !wanted.is_empty()
        && let Some(page) = pages.next().await?
    {
        for letter in page {
            if wanted.remove(letter.id.as_str()) {
                changes.insert(letter.id, letter.changes);
            }
        }
    }
    let mut outcome = RedriveReport { dry_run, ..RedriveReport::default() };
    if dry_run {
        outcome.redriven = changes.len() as u64;
        outcome.changes = changes.values().sum();
    } else {
        changes = redrive_letters(dead_letters, &changes, &mut outcome).await?;
    }
    let mut seen = HashSet::new();
    outcome.missing =
        ids.iter().filter(|id| !changes.contains_key(*id) && seen.insert(*id)).cloned().collect();
    Ok(outcome)
}

/// Queues dead letters again. `changes` holds the number of changes for each id. Returns the entries that
/// still existed.
async fn redrive_letters(
    dead_letters: &dyn DeadLetters,
    changes: &HashMap<String, u64>,
    outcome: &mut RedriveReport,
) -> failure::Result<HashMap<String, u64>> {
    let ids: Vec<String> = changes.keys().cloned().collect();
    let mut back = HashMap::new();
    for ids in ids.chunks(PAGE) {
        for id in dead_letters.redrive(ids).await? {
            let changes = changes.get(&id).copied().unwrap_or_default();
            outcome.redriven += 1;
            outcome.changes += changes;
            back.insert(id, changes);
        }
    }
    Ok(back)
}

fn describe(outcome: &RedriveReport) -> String {
    let count = |count, what| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
    format!(
        "{} with {} {}\n",
        count(outcome.redriven, "dead letter"),
        count(outcome.changes, "change"),
        if outcome.dry_run { "would be queued again" } else { "queued again" }
    )
}

/// A dead letter as text, one field on a line.
fn letter_text(letter: &DeadLetter) -> String {
    let times = |count: u32| if count == 1 { "once".to_owned() } else { format!("{count} times") };
    let mut text = format!(
        "id             {}\n\
         given up       {:.0}, in the {} lane\n\
         why            it {}\n\
         tries          received {}, tried alone {}\n",
        letter.id,
        letter.at,
        letter.lane.name(),
        letter.reason.map_or("was put there by another program", Reason::describe),
        times(letter.receive_count),
        times(letter.tries),
    );
    // Writing to a string can't fail.
    let _ = if let Some(body) = &letter.body {
        writeln!(text, "body           {}", single_line(&shortened(body)))
    } else {
        let first: Vec<&str> = letter.ids.iter().take(SHOWN_IDS).map(String::as_str).collect();
        let more = match letter.ids.len().saturating_sub(SHOWN_IDS) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        writeln!(text, "rows           {}{more}", single_line(&first.join(", ")))
    };
    if !letter.error.is_empty() {
        let _ = writeln!(text, "error          {}", single_line(&letter.error));
    }
    text
}

fn shortened(body: &str) -> String {
    match body.char_indices().nth(SHOWN_BODY_CHARS) {
        Some((end, _)) => format!("{}...", &body[..end]),
        None => body.to_owned(),
    }
}

/// Foreign text on one line, without control characters, which a terminal would obey.
fn single_line(text: &str) -> String {
    text.replace(char::is_control, " ")
}
