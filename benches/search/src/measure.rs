//! Measures one mode after the other, through the HTTP API.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use refarch::pipeline::embedder::Embedder;
use serde_json::{Value, json};

use crate::Arguments;
use crate::binary::{Binary, Roles};
use crate::corpus::{Corpus, Scored};
use crate::database::Database;
use crate::latency::{Percentiles, ask, median, times};
use crate::mode::{Mode, Variable};
use crate::questions::Questions;
use crate::strays::{self, Stray};
use crate::undo::Undo;

/// Rows on a page, and the depth of recall.
pub const DEPTH: usize = 10;

/// Seed of the questions.
const QUESTIONS_SEED: u64 = 7;

/// Seed of the products that are loaded while searches are measured. Seed 1 made those in the table.
const LOAD_SEED: &str = "99";

/// Different texts among repeated ones.
const REPEATED: usize = 20;

/// Questions between two looks at whether the load has ended.
const WHILE_LOADING: usize = 50;

/// Pause between two looks at whether everything is synced: short, and during a load, which it would disturb.
const SHORT_PAUSE: Duration = Duration::from_millis(300);
const LONG_PAUSE: Duration = Duration::from_secs(3);

/// A page that the listing of a million products has.
const DEEP_PAGE: usize = 100_000;

/// Requests for a status or a page.
const PAGE_REQUESTS: usize = 9;

/// Figures, by bench.
#[derive(Default)]
pub struct Figures {
    pub search: Vec<Value>,
    pub index: Vec<Value>,
    pub stray: Vec<Value>,
    pub page: Vec<Value>,
}

pub struct Bench<'a> {
    arguments: &'a Arguments,
    binary: &'a Binary,
    database: &'a Database,
    undo: Undo,
    embedder: Arc<dyn Embedder>,
    pub corpus: Corpus,
    questions: Questions,
    /// Questions for recall, their vectors, and the exact answers.
    asked: Vec<String>,
    pub queries: Vec<Vec<f32>>,
    pub exact: Vec<Vec<Scored>>,
    /// How many strays are the first hit of an exact search: by their own words, and by a paraphrase.
    exact_strays: Option<[usize; 2]>,
    pub figures: Figures,
}

impl<'a> Bench<'a> {
    pub async fn new(
        arguments: &'a Arguments,
        binary: &'a Binary,
        database: &'a Database,
        undo: Undo,
    ) -> Result<Self> {
        let embedder = binary.model().await?.start(1);
        eprintln!("reading all vectors");
        let corpus = database.export().await?;
        let strays = strays::all().len();
        ensure!(corpus.len() >= strays, "{} rows are too few: use at least {strays}", corpus.len());
        let mut questions = Questions::new(QUESTIONS_SEED);
        let asked = questions.take(arguments.queries as usize);
        let queries = embed(&*embedder, &asked).await?;
        eprintln!("answering {} questions exactly among {} vectors", asked.len(), corpus.len());
        let exact = corpus.nearest(&queries, DEPTH);
        let (exact_strays, figures) = (None, Figures::default());
        Ok(Self {
            arguments,
            binary,
            database,
            undo,
            embedder,
            corpus,
            questions,
            asked,
            queries,
            exact,
            exact_strays,
            figures,
        })
    }

    /// Measures a mode: builds its index anew, asks, edits rows into strays, and loads more rows.
    pub async fn measure(&mut self, mode: Mode, settings: &[Variable]) -> Result<()> {
        eprintln!("mode {}", mode.name());
        self.database.drop_indexes().await?;
        let mut roles = self.binary.start(settings).await?;
        self.index(mode, &roles.url).await?;
        for clients in self.arguments.clients.clone() {
            self.latency(mode, &roles.url, clients).await?;
        }
        if self.figures.page.is_empty() {
            self.pages(&roles.url).await?;
        }
        roles.check()?;
        self.strays(mode, &roles.url).await?;
        if self.arguments.while_loading > 0 {
            self.load(mode, settings, &mut roles).await?;
        }
        roles.stop().await
    }

    async fn index(&mut self, mode: Mode, url: &str) -> Result<()> {
        let built = match mode {
            Mode::Exact => None,
            _ => self.database.watch_build(mode.access_method()).await?,
        };
        // These requests also fill the caches of the database.
        let (answers, _) = ask(url, 1, &self.asked).await?;
        let each = answers.iter().zip(&self.exact).zip(&self.queries);
        let recalls: Vec<f64> =
            each.map(|((answer, exact), query)| self.corpus.recall(query, exact, &answer.ids)).collect();
        let recall = recalls.iter().sum::<f64>() / recalls.len() as f64;
        let least = recalls.iter().copied().fold(f64::INFINITY, f64::min);
        let built = built.as_ref();
        let state = built.map_or(&Value::Null, |built| &built.state);
        self.figures.index.push(json!({
            "mode": mode.name(), "rows": self.corpus.len(), "dimensions": self.corpus.dimensions,
            "index": built.map_or("none", |built| &built.access_method),
            "build_s": built.map(|built| built.build_s), "build_peak_mib": built.and_then(|built| built.peak_mib),
            "index_mib": built.map(|built| built.size_mib), "vectors_mib": self.database.vectors_mib().await?,
            "lists": state["lists"], "probes": state["probes"], "recall_by_refarch": state["recall"],
            "questions": self.asked.len(), "recall_at_10": recall, "recall_at_10_least": least,
        }));
        Ok(())
    }

    /// Distinct texts, so that no cache of embeddings answers; then few texts, again and again.
    async fn latency(&mut self, mode: Mode, url: &str, clients: usize) -> Result<()> {
        let repeated = self.questions.take(REPEATED.min(self.arguments.queries as usize));
        ask(url, clients, &repeated).await?;
        for texts in ["distinct", "repeated"] {
            let (mut p50, mut p99, mut speeds) = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..self.arguments.runs {
                let questions = match texts {
                    "distinct" => self.questions.take(self.arguments.queries as usize),
                    _ => repeated.iter().cycle().take(self.arguments.queries as usize).cloned().collect(),
                };
                let (answers, took) = ask(url, clients, &questions).await?;
                let percentiles =
                    Percentiles::of(&answers.iter().map(|answer| answer.ms).collect::<Vec<_>>());
                p50.push(percentiles.p50);
                p99.push(percentiles.p99);
                speeds.push(answers.len() as f64 / took.as_secs_f64());
            }
            self.figures.search.push(json!({
                "mode": mode.name(), "rows": self.corpus.len(), "clients": clients, "texts": texts, "loading": false,
                "queries": self.arguments.queries, "runs": self.arguments.runs,
                "p50_ms": median(&p50), "p99_ms": median(&p99), "searches_per_s": median(&speeds),
            }));
        }
        Ok(())
    }

    async fn pages(&mut self, url: &str) -> Result<()> {
        let last = self.corpus.len().div_ceil(DEPTH).clamp(1, DEEP_PAGE);
        let page = |page: usize| format!("/api/v1/products?page={page}&per_page={DEPTH}");
        for path in ["/api/v1/status".to_owned(), page(1), page(last)] {
            let measured = times(url, &path, PAGE_REQUESTS).await?;
            let percentiles = measured.as_ref().ok().map(|times| Percentiles::of(times));
            self.figures.page.push(json!({
                "path": path, "rows": self.corpus.len(), "requests": PAGE_REQUESTS,
                "p50_ms": percentiles.map(|of| of.p50), "most_ms": percentiles.map(|of| of.p99),
                "refused": measured.err(),
            }));
        }
        Ok(())
    }

    /// Edits rows into texts that are unlike all others, and asks for them.
    async fn strays(&mut self, mode: Mode, url: &str) -> Result<()> {
        let strays = strays::all();
        let every = self.corpus.len() / strays.len();
        let mut ids = self.corpus.ids().to_vec();
        ids.sort_unstable();
        let ids: Vec<i64> = ids.into_iter().step_by(every).take(strays.len()).collect();
        self.undo.note_texts(&self.database.texts(&ids).await?)?;
        let edits: Vec<_> =
            ids.iter().zip(&strays).map(|(id, stray)| (*id, Some(stray.text.clone()))).collect();
        self.database.set_texts(&edits).await?;
        self.binary.wait_until_synced(SHORT_PAUSE).await?;
        let asked: [Vec<String>; 2] = [
            strays.iter().map(|stray: &Stray| stray.text.clone()).collect(),
            strays.iter().map(|stray| stray.paraphrase.clone()).collect(),
        ];
        let exact = match self.exact_strays {
            Some(exact) => exact,
            None => self.exact_strays(&ids, &asked).await?,
        };
        self.exact_strays = Some(exact);
        for (number, by) in ["own words", "paraphrase"].into_iter().enumerate() {
            let (answers, _) = ask(url, 1, &asked[number]).await?;
            let found = |depth: usize| {
                let hits = answers.iter().zip(&ids);
                hits.filter(|(answer, id)| answer.ids.iter().take(depth).any(|hit| hit == *id)).count()
            };
            self.figures.stray.push(json!({
                "mode": mode.name(), "rows": self.corpus.len(), "asked_by": by, "strays": ids.len(),
                "first": found(1), "among_ten": found(DEPTH), "first_exact": exact[number],
            }));
        }
        self.restore().await
    }

    /// How many strays an exact search finds first, while the rows have these texts.
    async fn exact_strays(&mut self, ids: &[i64], asked: &[Vec<String>; 2]) -> Result<[usize; 2]> {
        let mut replaced = Vec::new();
        for (id, vector) in self.database.vectors_of(ids).await? {
            replaced.push((id, self.corpus.put(id, &vector).context("a row has got its first vector")?));
        }
        let mut found = [0; 2];
        for (number, texts) in asked.iter().enumerate() {
            let nearest = self.corpus.nearest(&embed(&*self.embedder, texts).await?, 1);
            found[number] = nearest.iter().zip(ids).filter(|(first, id)| first[0].0 == **id).count();
        }
        for (id, vector) in replaced {
            self.corpus.put(id, &vector);
        }
        Ok(found)
    }

    /// Loads products, and asks until all of them are searchable.
    async fn load(&mut self, mode: Mode, settings: &[Variable], roles: &mut Roles) -> Result<()> {
        let rows = self.arguments.while_loading;
        self.undo.note_greatest_id(self.database.products().await?.1)?;
        let (is_over, started) = (AtomicBool::new(false), Instant::now());
        let binary = self.binary;
        let load = async {
            let count = rows.to_string();
            let loaded = async {
                binary
                    .output(settings, &["generate", "--load", "--seed", LOAD_SEED, "--count", &count])
                    .await?;
                binary.wait_until_synced(LONG_PAUSE).await?;
                anyhow::Ok(started.elapsed())
            };
            let loaded = loaded.await;
            is_over.store(true, Ordering::Relaxed);
            loaded
        };
        let (arguments, questions) = (self.arguments, &mut self.questions);
        let asking = async {
            let mut times = vec![Vec::new(); arguments.clients.len()];
            while !is_over.load(Ordering::Relaxed) {
                for (number, &clients) in arguments.clients.iter().enumerate() {
                    let (answers, _) = ask(&roles.url, clients, &questions.take(WHILE_LOADING)).await?;
                    times[number].extend(answers.iter().map(|answer| answer.ms));
                }
                roles.check()?;
            }
            anyhow::Ok(times)
        };
        let (took, times) = tokio::try_join!(load, asking)?;
        for (&clients, times) in arguments.clients.iter().zip(&times) {
            let percentiles = Percentiles::of(times);
            self.figures.search.push(json!({
                "mode": mode.name(), "rows": self.corpus.len(), "clients": clients, "texts": "distinct", "loading": true,
                "queries": times.len(), "runs": 1, "p50_ms": percentiles.p50, "p99_ms": percentiles.p99,
                "loaded_rows": rows, "loaded_rows_per_s": rows as f64 / took.as_secs_f64(),
            }));
        }
        self.restore().await?;
        self.database.vacuum().await
    }

    async fn restore(&self) -> Result<()> {
        self.undo.restore(self.database).await?;
        self.binary.wait_until_synced(SHORT_PAUSE).await
    }
}

/// Embeds texts one by one, as searches are embedded.
async fn embed(embedder: &dyn Embedder, texts: &[String]) -> Result<Vec<Vec<f32>>> {
    let mut vectors = Vec::with_capacity(texts.len());
    for text in texts {
        vectors.push(embedder.embed_query(&Arc::from(text.as_str())).await?.to_vec());
    }
    Ok(vectors)
}
