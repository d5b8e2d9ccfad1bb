//! The database of the measured `refarch`, by SQL.

use std::pin::pin;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures::TryStreamExt as _;
use pgvector::HalfVector;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::Child;
use tokio_postgres::binary_copy::BinaryCopyOutStream;
use tokio_postgres::types::Type;
use tokio_postgres::{Client, NoTls};

use crate::binary::Binary;
use crate::corpus::Corpus;

/// The source's table.
const PRODUCTS: &str = "public.products_with_increment";

/// How long a build of an index may take to begin.
const BUILD_BEGINS_IN: Duration = Duration::from_mins(1);

/// How long refarch may take to describe an index that it has built.
const DESCRIBED_IN: Duration = Duration::from_mins(3);

/// Time between two looks at a build, and between two readings of its memory.
const LOOK: Duration = Duration::from_millis(20);
const WEIGH: Duration = Duration::from_millis(500);

/// An approximate index over the vectors.
pub struct BuiltIndex {
    pub access_method: String,
    pub size_mib: f64,
    pub build_s: f64,
    /// Most memory of the processes that built it. None if it was not read.
    pub peak_mib: Option<f64>,
    /// refarch's own description of it, if this version keeps one.
    pub state: Value,
}

/// A session. The database runs at least as long.
pub struct Database {
    pub client: Client,
    /// psql keeps the private PostgreSQL running until its standard input ends.
    psql: Child,
    /// The table of vectors, quoted, and its oid.
    vectors: String,
    vectors_oid: u32,
    column: String,
}

impl Database {
    /// Asks psql, as `refarch psql` starts it, for the address.
    pub async fn open(binary: &Binary) -> Result<Self> {
        let mut psql = binary
            .command(&[])
            .args(["psql", "-X", "-q"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = psql.stdin.as_mut().context("psql has no input")?;
        input
            .write_all(
                b"\\! printf '%s\\n' \"$PGHOST\" \"$PGPORT\" \"$PGUSER\" \"$PGPASSWORD\" \"$PGDATABASE\"\n",
            )
            .await?;
        let mut lines = BufReader::new(psql.stdout.take().context("psql has no output")?).lines();
        let mut next = async || lines.next_line().await?.context("refarch psql has ended");
        let mut config = tokio_postgres::Config::new();
        config.host(next().await?).port(next().await?.parse()?).user(next().await?);
        config.password(next().await?).dbname(next().await?);
        let (client, connection) = config.connect(NoTls).await?;
        tokio::spawn(connection);
        let row = client
            .query_opt(
                "SELECT c.oid, format('%I.%I', n.nspname, c.relname), quote_ident(a.attname) \
                 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                 JOIN pg_attribute a ON a.attrelid = c.oid JOIN pg_type t ON t.oid = a.atttypid \
                 WHERE n.nspname = 'refarch' AND c.relkind = 'r' AND t.typname = 'halfvec' \
                 ORDER BY pg_relation_size(c.oid) DESC LIMIT 1",
                &[],
            )
            .await?
            .context("schema refarch has no table with vectors")?;
        Ok(Self { client, psql, vectors_oid: row.get(0), vectors: row.get(1), column: row.get(2) })
    }

    /// Ends the session, and the database if nothing else uses it.
    pub async fn close(mut self) -> Result<()> {
        drop(self.client);
        drop(self.psql.stdin.take());
        self.psql.wait().await?;
        Ok(())
    }

    /// The number of products, and the greatest id.
    pub async fn products(&self) -> Result<(i64, i64)> {
        let sql = format!("SELECT count(*), coalesce(max(id), 0) FROM {PRODUCTS}");
        let row = self.client.query_one(&sql, &[]).await?;
        Ok((row.get(0), row.get(1)))
    }

    /// The descriptions of these products.
    pub async fn texts(&self, ids: &[i64]) -> Result<Vec<(i64, Option<String>)>> {
        let sql = format!("SELECT id, description FROM {PRODUCTS} WHERE id = ANY ($1)");
        let rows = self.client.query(&sql, &[&ids]).await?;
        Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
    }

    /// Updates the descriptions of products.
    pub async fn set_texts(&self, texts: &[(i64, Option<String>)]) -> Result<()> {
        let (ids, texts): (Vec<i64>, Vec<Option<&str>>) =
            texts.iter().map(|(id, text)| (*id, text.as_deref())).unzip();
        let sql = format!(
            "UPDATE {PRODUCTS} p SET description = n.text \
             FROM unnest($1::bigint[], $2::text[]) n (id, text) WHERE p.id = n.id"
        );
        let count = self.client.execute(&sql, &[&ids, &texts]).await?;
        ensure!(count == ids.len() as u64, "{count} of {} products were updated", ids.len());
        Ok(())
    }

    /// Deletes the products with greater ids.
    pub async fn delete_above(&self, id: i64) -> Result<()> {
        self.client.execute(&format!("DELETE FROM {PRODUCTS} WHERE id > $1"), &[&id]).await?;
        Ok(())
    }

    /// Removes dead rows and reads statistics, as autovacuum does in time.
    pub async fn vacuum(&self) -> Result<()> {
        for table in [PRODUCTS, &self.vectors] {
            self.client.batch_execute(&format!("VACUUM (ANALYZE) {table}")).await?;
        }
        Ok(())
    }

    /// The size of the table of vectors, without its indexes.
    pub async fn vectors_mib(&self) -> Result<f64> {
        let row = self.client.query_one("SELECT pg_table_size($1::oid)", &[&self.vectors_oid]).await?;
        Ok(mib(row.get(0)))
    }

    /// All stored vectors.
    pub async fn export(&self) -> Result<Corpus> {
        let select = format!("SELECT id, {} FROM {}", self.column, self.vectors);
        let halfvec = self.client.prepare(&select).await?.columns()[1].type_().clone();
        let stream = self.client.copy_out(&format!("COPY ({select}) TO STDOUT (FORMAT binary)")).await?;
        let mut rows = pin!(BinaryCopyOutStream::new(stream, &[Type::TEXT, halfvec]));
        let mut corpus = Corpus::new(0);
        while let Some(row) = rows.try_next().await? {
            let vector = floats(row.try_get(1)?);
            if corpus.len() == 0 {
                corpus = Corpus::new(vector.len());
            }
            corpus.put(row.try_get::<&str>(0)?.parse()?, &vector);
        }
        Ok(corpus)
    }

    /// The stored vectors of these rows.
    pub async fn vectors_of(&self, ids: &[i64]) -> Result<Vec<(i64, Vec<f32>)>> {
        let texts: Vec<String> = ids.iter().map(i64::to_string).collect();
        let sql = format!("SELECT id, {} FROM {} WHERE id = ANY ($1)", self.column, self.vectors);
        let rows = self.client.query(&sql, &[&texts]).await?;
        rows.iter().map(|row| Ok((row.get::<_, &str>(0).parse()?, floats(row.get(1))))).collect()
    }

    /// Drops all approximate indexes over the vectors, so that the next mode builds its own.
    pub async fn drop_indexes(&self) -> Result<()> {
        let rows = self
            .client
            .query(
                "SELECT format('DROP INDEX %s', i.indexrelid::regclass) FROM pg_index i \
                 JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am a ON a.oid = c.relam \
                 WHERE i.indrelid = $1 AND a.amname IN ('hnsw', 'ivfflat')",
                &[&self.vectors_oid],
            )
            .await?;
        for row in rows {
            self.client.batch_execute(row.get(0)).await?;
        }
        Ok(())
    }

    /// Watches the build of an index, with an access method if one is expected. None if no build begins.
    pub async fn watch_build(&self, access_method: Option<&str>) -> Result<Option<BuiltIndex>> {
        let statement = self
            .client
            .prepare(
                "SELECT (SELECT pid FROM pg_stat_progress_create_index WHERE relid = $1 LIMIT 1), \
                        i.indisvalid, a.amname::text, pg_relation_size(i.indexrelid) \
                 FROM (VALUES (1)) one LEFT JOIN (pg_index i JOIN pg_class c ON c.oid = i.indexrelid \
                     JOIN pg_am a ON a.oid = c.relam AND a.amname IN ('hnsw', 'ivfflat')) ON i.indrelid = $1 \
                 ORDER BY i.indisvalid DESC NULLS LAST LIMIT 1",
            )
            .await?;
        let (opened, mut begun, mut weighed) = (Instant::now(), None, None::<Instant>);
        let mut last_look = opened;
        let mut peak_mib = None;
        loop {
            let row = self.client.query_one(&statement, &[&self.vectors_oid]).await?;
            let (pid, is_valid): (Option<i32>, Option<bool>) = (row.get(0), row.get(1));
            if pid.is_some() || is_valid.is_some() {
                begun.get_or_insert(last_look);
            }
            let found: Option<String> = row.get(2);
            if let (Some(true), Some(found), Some(begun)) = (is_valid, found, begun) {
                let build_s = begun.elapsed().as_secs_f64();
                if access_method.is_none_or(|wanted| wanted == found) {
                    let state = self.state(&found).await?;
                    let size_mib = mib(row.get(3));
                    return Ok(Some(BuiltIndex { access_method: found, size_mib, build_s, peak_mib, state }));
                }
            }
            if begun.is_none() && opened.elapsed() > BUILD_BEGINS_IN {
                return Ok(None);
            }
            if let Some(pid) = pid
                && weighed.is_none_or(|last| last.elapsed() > WEIGH)
            {
                weighed = Some(Instant::now());
                let now = self.memory_mib(pid).await?;
                peak_mib = [peak_mib, now].into_iter().flatten().reduce(f64::max);
            }
            last_look = Instant::now();
            tokio::time::sleep(LOOK).await;
        }
    }

    /// refarch's description of the index. Waits a while for it where this version has the table.
    async fn state(&self, access_method: &str) -> Result<Value> {
        let has_state = "SELECT to_regclass('refarch.search_index') IS NOT NULL";
        if !self.client.query_one(has_state, &[]).await?.get::<_, bool>(0) {
            return Ok(Value::Null);
        }
        // Only lists have a description; it is complete once they are checked and the outliers are found.
        if access_method != "ivfflat" {
            return Ok(Value::Null);
        }
        let started = Instant::now();
        loop {
            let rows = self.client.query("SELECT to_jsonb(s)::text FROM refarch.search_index s", &[]).await?;
            for row in rows {
                let state: Value = serde_json::from_str(row.get(0))?;
                // An older version does not look for outliers.
                let is_looked_through = state.get("outliers").is_none_or(|outliers| !outliers.is_null());
                if !state["recall"].is_null() && is_looked_through {
                    return Ok(state);
                }
            }
            if started.elapsed() > DESCRIBED_IN {
                return Ok(Value::Null);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// The memory of a build by this process and its helpers: shared pages count in part. Linux only.
    async fn memory_mib(&self, pid: i32) -> Result<Option<f64>> {
        let sql = "SELECT pid FROM pg_stat_activity WHERE pid = $1 OR leader_pid = $1";
        let mut sum = None;
        for row in self.client.query(sql, &[&pid]).await? {
            let pid: i32 = row.get(0);
            // The process may have ended, or belong to a user whose processes cannot be read.
            let Ok(text) = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")) else { continue };
            let pss = text.lines().find_map(|line| line.strip_prefix("Pss:"));
            let kib = pss.and_then(|pss| pss.trim().trim_end_matches(" kB").parse::<f64>().ok());
            if let Some(kib) = kib {
                *sum.get_or_insert(0.0) += kib / 1024.0;
            }
        }
        Ok(sum)
    }

    /// The versions of the server and of pgvector, for the reports.
    pub async fn versions(&self) -> Result<String> {
        let sql = "SELECT format('PostgreSQL %s, pgvector %s', current_setting('server_version'), extversion) \
                   FROM pg_extension WHERE extname = 'vector'";
        Ok(self.client.query_one(sql, &[]).await?.get(0))
    }
}

fn floats(vector: HalfVector) -> Vec<f32> {
    Vec::from(vector).into_iter().map(f32::from).collect()
}

fn mib(bytes: i64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
