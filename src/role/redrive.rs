//! `refarch redrive`: dead letters, listed or brought back into work.

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;

use anyhow::bail;
use serde::Serialize;

use crate::backend::{Backends, Database};
use crate::cli;
use crate::config::Settings;
use crate::pipeline::failure;
use crate::pipeline::queue::{DeadLetter, DeadLetters, Reason};

/// Letters in memory at a time.
const PAGE: usize = 500;

/// Row ids that a letter shows to people.
const IDS: usize = 5;

/// Characters of a body that cannot be read, as shown to people.
const BODY: usize = 300;

/// What went back, or would go.
#[derive(Debug, Default, Serialize)]
struct Outcome {
    /// Letters.
    redriven: u64,
    /// Changes in them.
    changes: u64,
    /// Ids asked for that are not there.
    missing: Vec<String>,
    /// Whether all is as it was.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    dry_run: bool,
}

/// Lists the dead letters, or brings some or all of them back.
pub async fn run(args: &cli::Redrive, settings: &Settings) -> anyhow::Result<()> {
    super::with_database(settings, async |database: &Database| {
        let backends = Backends::open(&database.postgres, settings).await?;
        let dead_letters = &*backends.queue.dead_letters;
        let outcome = if args.all {
            all(dead_letters, args.dry_run).await?
        } else if args.id.is_empty() {
            return list(dead_letters, args.json).await;
        } else {
            named(dead_letters, &args.id, args.dry_run).await?
        };
        let text = if args.json { serde_json::to_string(&outcome)? + "\n" } else { describe(&outcome) };
        super::print(text.as_bytes())?;
        if !outcome.missing.is_empty() {
            let named = outcome.missing.join(", ");
            bail!("no dead letter has the id {named}: refarch redrive lists those that are there");
        }
        Ok(())
    })
    .await
}

/// The dead letters from the oldest on, page by page.
struct Pages<'a> {
    dead_letters: &'a dyn DeadLetters,
    after: Option<String>,
}

impl<'a> Pages<'a> {
    fn of(dead_letters: &'a dyn DeadLetters) -> Self {
        Self { dead_letters, after: None }
    }

    /// The next page; none after the last one.
    async fn next(&mut self) -> failure::Result<Option<Vec<DeadLetter>>> {
        let page = self.dead_letters.list(self.after.as_deref(), PAGE).await?;
        let Some(last) = page.last() else { return Ok(None) };
        self.after = Some(last.id.clone());
        Ok(Some(page))
    }
}

async fn list(dead_letters: &dyn DeadLetters, json: bool) -> anyhow::Result<()> {
    let mut pages = Pages::of(dead_letters);
    let mut is_first = true;
    while let Some(page) = pages.next().await? {
        let mut text = String::new();
        for letter in page {
            if json {
                text += &serde_json::to_string(&letter)?;
                text.push('\n');
            } else {
                text += if is_first { "" } else { "\n" };
                text += &block(&letter);
            }
            is_first = false;
        }
        super::print(text.as_bytes())?;
    }
    if is_first && !json {
        super::print(b"no dead letters\n")?;
    }
    Ok(())
}

/// Brings back every letter that is there now. One that dies again at once has a new place behind
/// them, and would be brought back for ever.
async fn all(dead_letters: &dyn DeadLetters, dry_run: bool) -> failure::Result<Outcome> {
    let mut there = Outcome { dry_run: true, ..Outcome::default() };
    let mut last = None;
    let mut pages = Pages::of(dead_letters);
    while let Some(mut page) = pages.next().await? {
        there.redriven += page.len() as u64;
        there.changes += page.iter().map(|letter| letter.changes).sum::<u64>();
        last = page.pop();
    }
    let Some(last) = last.filter(|_| !dry_run) else {
        return Ok(Outcome { dry_run, ..there });
    };
    if let Some(redriven) = dead_letters.redrive_all().await? {
        return Ok(Outcome { redriven, changes: there.changes, ..Outcome::default() });
    }
    let mut outcome = Outcome::default();
    let mut pages = Pages::of(dead_letters);
    while let Some(mut page) = pages.next().await? {
        let end = page.iter().position(|letter| letter.id == last.id);
        // Somebody else may have brought the last one back meanwhile.
        if end.is_none() && page[0].at > last.at {
            break;
        }
        page.truncate(end.map_or(page.len(), |end| end + 1));
        let changes = page.into_iter().map(|letter| (letter.id, letter.changes)).collect();
        bring_back(dead_letters, &changes, &mut outcome).await?;
        if end.is_some() {
            break;
        }
    }
    Ok(outcome)
}

/// Brings back the letters of these ids.
async fn named(dead_letters: &dyn DeadLetters, ids: &[String], dry_run: bool) -> failure::Result<Outcome> {
    let mut wanted: HashSet<&str> = ids.iter().map(String::as_str).collect();
    let mut changes = HashMap::new();
    let mut pages = Pages::of(dead_letters);
    while !wanted.is_empty()
        && let Some(page) = pages.next().await?
    {
        for letter in page {
            if wanted.remove(letter.id.as_str()) {
                changes.insert(letter.id, letter.changes);
            }
        }
    }
    let mut outcome = Outcome { dry_run, ..Outcome::default() };
    if dry_run {
        outcome.redriven = changes.len() as u64;
        outcome.changes = changes.values().sum();
    } else {
        changes = bring_back(dead_letters, &changes, &mut outcome).await?;
    }
    let mut seen = HashSet::new();
    outcome.missing =
        ids.iter().filter(|id| !changes.contains_key(*id) && seen.insert(*id)).cloned().collect();
    Ok(outcome)
}

/// Brings letters back, given the changes in each; returns those that were still there.
async fn bring_back(
    dead_letters: &dyn DeadLetters,
    changes: &HashMap<String, u64>,
    outcome: &mut Outcome,
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

fn describe(outcome: &Outcome) -> String {
    let count = |count, what| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
    format!(
        "{} with {} {}\n",
        count(outcome.redriven, "dead letter"),
        count(outcome.changes, "change"),
        if outcome.dry_run { "would go back into work" } else { "went back into work" }
    )
}

/// A letter for people.
fn block(letter: &DeadLetter) -> String {
    let times = |count: u32| if count == 1 { "once".to_owned() } else { format!("{count} times") };
    let mut text = format!(
        "id             {}\n\
         given up       {:.0}, in the {} lane\n\
         why            it {}\n\
         tries          received {}, tried by itself {}\n",
        letter.id,
        letter.at,
        letter.lane.name(),
        letter.reason.map_or("was put there by somebody else", Reason::describe),
        times(letter.receive_count),
        times(letter.tries),
    );
    // Writing to a string can't fail.
    let _ = if let Some(body) = &letter.body {
        writeln!(text, "body           {}", line(&shortened(body)))
    } else {
        let first: Vec<&str> = letter.ids.iter().take(IDS).map(String::as_str).collect();
        let more = match letter.ids.len().saturating_sub(IDS) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        writeln!(text, "rows           {}{more}", line(&first.join(", ")))
    };
    if !letter.error.is_empty() {
        let _ = writeln!(text, "error          {}", line(&letter.error));
    }
    text
}

fn shortened(body: &str) -> String {
    match body.char_indices().nth(BODY) {
        Some((end, _)) => format!("{}...", &body[..end]),
        None => body.to_owned(),
    }
}

/// Text from elsewhere on one line, with nothing in it that a terminal would obey.
fn line(text: &str) -> String {
    text.replace(char::is_control, " ")
}
