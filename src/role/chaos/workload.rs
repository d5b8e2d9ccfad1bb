//! An application that writes at a steady rate, and remembers which rows must be searchable.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde::Serialize;
use tokio::sync::RwLock;
use tokio_postgres::{Client, NoTls};
use tokio_util::sync::CancellationToken;

use crate::role::generate::fake_products::{FakeProducts, ProductText};
use crate::secret::Secret;

/// Pause between two statements: some 20 changes a second on average.
const PAUSE: Duration = Duration::from_millis(150);

/// Pause before a new connection to the database.
const RECONNECT: Duration = Duration::from_millis(200);

/// Distinct texts to write. They are few enough that texts repeat.
const DISTINCT_TEXTS: u64 = 100_000;

/// Counts of writes: rows, except statements and truncations.
#[derive(Clone, Copy, Debug, Default, Serialize)]
#[allow(missing_docs)]
pub struct WorkloadCounts {
    pub statements: u64,
    pub inserted: u64,
    pub updated: u64,
    pub deleted: u64,
    pub reinserted: u64,
    pub truncations: u64,
    /// Statements that may or may not have been committed: the database did not answer.
    pub unsure: u64,
    /// Statements that failed although the database was up. There must be none: capture must never fail a
    /// statement of the application.
    pub writes_failed: u64,
}

/// The table's form, which the application must know.
#[derive(Debug)]
pub struct TableShape {
    /// The name of the column that is embedded.
    pub description: String,
    /// Whether the key accepts values outside of integer's range.
    pub is_wide: bool,
    /// Whether the database was restored to an earlier state and the application has not reread it yet.
    pub was_restored: bool,
}

impl Default for TableShape {
    fn default() -> Self {
        Self { description: "description".into(), is_wide: false, was_restored: false }
    }
}

/// The first id after the key was widened. It is outside of integer's range.
const FIRST_WIDE_ID: i64 = 3_000_000_000;

/// Most errors that are kept as text.
const MAX_FAILURES_KEPT: usize = 5;

/// A row as the index must hold it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpectedRow {
    /// Its name; none if it is null.
    pub name: Option<String>,
    /// Its description; none if it is null.
    pub description: Option<String>,
}

/// Rows by their id.
pub type ExpectedRows = BTreeMap<i64, ExpectedRow>;

/// The application.
pub struct Workload {
    url: Secret,
    client: Option<Client>,
    rng: StdRng,
    fake_products: FakeProducts,
    next_id: i64,
    /// The end of the ids from before the key was widened.
    narrow_id_end: i64,
    deleted_ids: Vec<i64>,
    table_shape: Arc<RwLock<TableShape>>,
    /// Errors of statements, the first few.
    pub failures: Vec<String>,
    /// The rows that must be searchable.
    pub expected: ExpectedRows,
    /// Counts of writes so far.
    pub counts: WorkloadCounts,
}

impl Workload {
    /// A writer that knows the table's current rows.
    pub async fn new(url: Secret, seed: u64, table_shape: Arc<RwLock<TableShape>>) -> anyhow::Result<Self> {
        let mut workload = Self {
            url,
            client: None,
            rng: StdRng::seed_from_u64(seed),
            fake_products: FakeProducts::new(seed),
            next_id: 1,
            narrow_id_end: 1,
            deleted_ids: Vec::new(),
            table_shape,
            failures: Vec::new(),
            expected: ExpectedRows::new(),
            counts: WorkloadCounts::default(),
        };
        workload.reload("description").await;
        Ok(workload)
    }

    /// Writes until `stop`; `truncate` is asked before each statement.
    pub async fn run(
        &mut self,
        stop: &CancellationToken,
        mut truncate: impl FnMut() -> bool,
    ) -> anyhow::Result<()> {
        let table_shape = Arc::clone(&self.table_shape);
        while !stop.is_cancelled() {
            let mut shape = table_shape.write().await;
            if std::mem::take(&mut shape.was_restored) {
                self.client = None;
                self.reload(&shape.description).await;
            }
            // The lock keeps the operator from renaming the column during the write.
            let table_shape = shape.downgrade();
            if truncate() {
                self.truncate(&table_shape).await;
            } else {
                self.step(&table_shape).await;
            }
            drop(table_shape);
            stop.run_until_cancelled(tokio::time::sleep(PAUSE)).await;
        }
        Ok(())
    }

    async fn step(&mut self, table_shape: &TableShape) {
        if table_shape.is_wide && self.next_id < FIRST_WIDE_ID {
            (self.narrow_id_end, self.next_id) = (self.next_id, FIRST_WIDE_ID);
        }
        let description = &table_shape.description;
        let kind = self.rng.random_range(0..100);
        let many = if self.rng.random_ratio(1, 60) { 150 } else { self.rng.random_range(1..6) };
        let ids = match kind {
            0..25 => {
                let first = self.next_id;
                self.next_id += many;
                self.counts.inserted += many as u64;
                (first..first + many).collect()
            }
            25..35 if !self.deleted_ids.is_empty() => {
                let at = self.rng.random_range(0..self.deleted_ids.len());
                self.counts.reinserted += 1;
                vec![self.deleted_ids.swap_remove(at)]
            }
            35..55 => {
                let ids = self.some_ids((many as usize).min(5));
                self.counts.deleted += ids.len() as u64;
                self.deleted_ids.extend(&ids);
                let sql = "DELETE FROM public.products_with_increment WHERE id = ANY ($1::bigint[])";
                return self.commit(table_shape, sql, &ids, None).await;
            }
            _ => {
                let ids = self.some_ids(many as usize);
                self.counts.updated += ids.len() as u64;
                let products = self.products(&ids);
                let sql = format!(
                    "UPDATE public.products_with_increment p SET name = u.name, {description} = u.text \
                     FROM unnest($1::bigint[], $2::text[], $3::text[]) AS u(id, name, text) WHERE p.id = u.id"
                );
                return self.commit(table_shape, &sql, &ids, Some(products)).await;
            }
        };
        let products = self.products(&ids);
        self.commit(table_shape, &insert(table_shape), &ids, Some(products)).await;
    }

    async fn truncate(&mut self, table_shape: &TableShape) {
        self.counts.truncations += 1;
        self.deleted_ids.extend(self.expected.keys());
        self.deleted_ids.truncate(10_000);
        let ids: Vec<i64> = self.expected.keys().copied().collect();
        // Half of the rows are inserted again at once.
        let back: Vec<i64> = ids.iter().copied().step_by(2).collect();
        self.commit(table_shape, "TRUNCATE public.products_with_increment", &[], None).await;
        if self.expected.is_empty() && !back.is_empty() {
            self.deleted_ids.retain(|id| !back.contains(id));
            self.counts.reinserted += back.len() as u64;
            let products = self.products(&back);
            self.commit(table_shape, &insert(table_shape), &back, Some(products)).await;
        }
    }

    fn some_ids(&mut self, many: usize) -> Vec<i64> {
        let mut ids = Vec::new();
        for _ in 0..many.min(self.expected.len()) {
            // Ids from before and after the widening, with equal probability.
            let keys = match self.next_id > FIRST_WIDE_ID {
                true if self.rng.random() => FIRST_WIDE_ID..self.next_id,
                true => 0..self.narrow_id_end,
                false => 0..self.next_id,
            };
            let from = self.rng.random_range(keys);
            let found = self.expected.range(from..).next().or_else(|| self.expected.iter().next());
            ids.extend(found.map(|(id, _)| *id));
        }
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    fn products(&mut self, ids: &[i64]) -> Vec<ExpectedRow> {
        let mut text = ProductText::default();
        ids.iter()
            .map(|_| {
                self.fake_products.product(self.rng.random_range(0..DISTINCT_TEXTS), &mut text);
                // A row without a text must not be in the index.
                let described = !self.rng.random_ratio(1, 40);
                ExpectedRow {
                    name: Some(text.name.clone()),
                    description: described.then(|| text.description.clone()),
                }
            })
            .collect()
    }

    /// Runs a statement in its own transaction, and remembers the result. Without `products` the ids are
    /// deleted; without ids every row is deleted.
    async fn commit(
        &mut self,
        table_shape: &TableShape,
        sql: &str,
        ids: &[i64],
        products: Option<Vec<ExpectedRow>>,
    ) {
        self.counts.statements += 1;
        let done = self.try_commit(sql, ids, products.as_deref()).await;
        let Err(error) = done else {
            match products {
                Some(products) => self.expected.extend(ids.iter().copied().zip(products)),
                None if sql.starts_with("TRUNCATE") => self.expected.clear(),
                None => self.expected.retain(|id, _| ids.binary_search(id).is_err()),
            }
            return;
        };
        // The table tells whether the statement was committed.
        if is_unavailable(&error) {
            self.counts.unsure += 1;
        } else {
            self.counts.writes_failed += 1;
            if self.failures.len() < MAX_FAILURES_KEPT {
                self.failures.push(format!("{:#}", anyhow::Error::from(error).context(sql.to_owned())));
            }
        }
        self.client = None;
        self.reload(&table_shape.description).await;
    }

    async fn try_commit(
        &mut self,
        sql: &str,
        ids: &[i64],
        products: Option<&[ExpectedRow]>,
    ) -> Result<(), tokio_postgres::Error> {
        if self.client.is_none() {
            self.client = Some(connect(&self.url).await?);
        }
        let Some(client) = &mut self.client else { return Ok(()) };
        let transaction = client.transaction().await?;
        match products {
            Some(products) => {
                let names: Vec<&Option<String>> = products.iter().map(|product| &product.name).collect();
                let texts: Vec<&Option<String>> =
                    products.iter().map(|product| &product.description).collect();
                transaction.execute(sql, &[&ids, &names, &texts]).await?;
            }
            None if ids.is_empty() => drop(transaction.execute(sql, &[]).await?),
            None => drop(transaction.execute(sql, &[&ids]).await?),
        }
        transaction.commit().await
    }

    /// Reads the table's rows as the rows that must be searchable.
    async fn reload(&mut self, description: &str) {
        loop {
            // The database may be away for a while.
            let Ok(expected) = self.try_reload(description).await else {
                self.client = None;
                tokio::time::sleep(RECONNECT).await;
                continue;
            };
            self.next_id = self.next_id.max(expected.keys().next_back().map_or(1, |last| last + 1));
            self.deleted_ids.retain(|id| !expected.contains_key(id));
            self.expected = expected;
            return;
        }
    }

    async fn try_reload(&mut self, description: &str) -> Result<ExpectedRows, tokio_postgres::Error> {
        if self.client.is_none() {
            self.client = Some(connect(&self.url).await?);
        }
        let Some(client) = &self.client else { return Ok(ExpectedRows::new()) };
        let sql = format!("SELECT id::bigint, name, {description} FROM public.products_with_increment");
        let rows = client.query(&sql, &[]).await?;
        Ok(rows
            .iter()
            .map(|row| (row.get(0), ExpectedRow { name: row.get(1), description: row.get(2) }))
            .collect())
    }
}

/// The statement that adds rows.
fn insert(table_shape: &TableShape) -> String {
    format!(
        "INSERT INTO public.products_with_increment (id, name, {}) \
         SELECT * FROM unnest($1::bigint[], $2::text[], $3::text[])",
        table_shape.description
    )
}

/// Whether the database is away: it crashed, was stopped, or has no free connection.
fn is_unavailable(error: &tokio_postgres::Error) -> bool {
    error.code().is_none_or(|code| {
        code.code().starts_with("08")
            || code.code().starts_with("53")
            || matches!(code.code(), "57P01" | "57P02" | "57P03" | "57P05")
    })
}

/// A connection that closes when its client is dropped.
pub async fn connect(url: &Secret) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(url.expose(), NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}
