//! The search of a page, in one statement, through lists that miss a text unlike all others.

use std::sync::Arc;

use refarch::backend::pgvector::{PgVector, PgVectorOptions};
use refarch::backend::postgres::generation::Generation;
use refarch::backend::postgres::products::{Exact, Found, Products, VectorSource as _};
use refarch::config::SearchMethod;
use refarch::pipeline::index::{Desired, Planned, VectorIndex as _, Writes};
use refarch::pipeline::ledger::{Ledger as _, Peeked};

use crate::common::source::{Migrated, graph_options, settings};

/// Products lie on a circle around the third axis, the first of them on the first axis.
const PRODUCTS: i64 = 1_200;

/// A product that is unlike all others: near the third axis, a little nearer to the first one.
const STRAY: i64 = 5_000;
const STRAY_VECTOR: [f32; 3] = [0.2, 0.0, 0.98];

/// Near the stray product, and a little nearer to the opposite side of the circle, where a search reads the lists.
const QUERY: [f32; 3] = [-0.2, 0.0, 0.98];

/// The table is so small that PostgreSQL would rather read and sort it.
const USE_INDEXES: &str = "DO $$ BEGIN \
    EXECUTE format('ALTER DATABASE %I SET enable_seqscan = off', current_database()); \
    EXECUTE format('ALTER DATABASE %I SET enable_sort = off', current_database()); END $$";

/// Products with their vectors.
struct Shop {
    it: Migrated,
    generation: Generation,
    index: Arc<PgVector>,
    products: Products,
}

impl Shop {
    async fn new(method: SearchMethod) -> Self {
        let it = Migrated::new(USE_INDEXES, settings(&[]), "pgvector").await;
        let generation = it.generation().await;
        let rows = format!(
            "INSERT INTO products_with_increment (id, name, sku, description) \
               SELECT i, 'name ' || i, 'SKU-' || i, 'text ' || i FROM generate_series(1, {PRODUCTS}) i; \
             INSERT INTO {} (id, embedding, content_hash) \
               SELECT id::text, ARRAY[cos(id * 2 * pi() / {PRODUCTS}), sin(id * 2 * pi() / {PRODUCTS}), 0]::real[]::halfvec, '' \
               FROM products_with_increment",
            Self::vectors(&generation)
        );
        it.client.batch_execute(&rows).await.unwrap();
        let options = PgVectorOptions { method, ..graph_options(1_000) };
        let index = Arc::new(it.pgvector_with(&generation, options));
        let products = Products::new(it.postgres.pool.clone(), &generation.table.relation)
            .with_vectors(Arc::clone(&index) as _);
        Self { it, generation, index, products }
    }

    /// With lists that no check has seen yet.
    async fn listed() -> Self {
        let shop = Self::new(SearchMethod::Lists).await;
        assert!(shop.index.maintain(0).await.unwrap(), "the lists are built");
        shop
    }

    fn vectors(generation: &Generation) -> String {
        format!("refarch.vector_{}", generation.id)
    }

    async fn run(&self, sql: &str) {
        self.it.client.batch_execute(sql).await.unwrap();
    }

    /// Writes a product, and its vector as the indexer does.
    async fn write(&self, id: i64, text: &str, vector: [f32; 3]) {
        let sql = "INSERT INTO products_with_increment (id, name, sku, description) VALUES ($1::bigint, 'stray', 'stray', $2) \
                   ON CONFLICT (id) DO UPDATE SET description = excluded.description";
        self.it.client.execute(sql, &[&id, &text]).await.unwrap();
        let ledger = self.it.ledger(&self.generation);
        let Peeked { id, row, entry } = ledger.peek(&[id.to_string()]).await.unwrap().remove(0);
        let desired = Desired::Present { row: row.expect("the row"), embedding: Some(Arc::new(vector)) };
        let planned = Planned { id, revision: entry.map(|entry| entry.revision), version: 1, desired };
        let Writes::Transactional(writes) = self.index.writes() else {
            panic!("its writes are transactional")
        };
        assert!(writes.apply(&[planned]).await.unwrap().conflicted.is_empty());
    }

    /// Lets the hourly check begin.
    async fn check(&self) {
        self.run("UPDATE refarch.search_index SET checked_at = NULL").await;
        assert!(self.index.maintain(0).await.unwrap(), "a check is due");
    }

    async fn outliers(&self) -> Vec<String> {
        let sql = "SELECT id FROM refarch.outlier ORDER BY id";
        self.it.client.query(sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
    }

    async fn search(&self, term: &str, vector: &[f32; 3], offset: usize, count: usize) -> Vec<Found> {
        self.products.search(term, vector, offset, count).await.unwrap().expect("one statement")
    }

    /// The first rows of both forms of a search.
    async fn first(&self, vector: &[f32; 3]) -> [i64; 2] {
        let other = self.index.query(vector, 1_000).await.unwrap();
        [self.search("term", vector, 0, 3).await[0].product.id, other[0].id.parse().unwrap()]
    }

    /// Second looks so far: with and without a find.
    fn second_looks(&self) -> [u64; 2] {
        let looks = self.index.second_looks();
        [looks.found.get(), looks.nothing.get()]
    }

    /// The pages, one after the other, are the ranking as it is read in one piece.
    async fn assert_pages_agree(&self, vector: &[f32; 3]) {
        let whole = ids(&self.search("term", vector, 0, 1_000).await);
        let mut paged = Vec::new();
        for offset in (0..400).step_by(10) {
            paged.extend(ids(&self.search("term", vector, offset, 10).await));
        }
        assert_eq!(paged, whole[..400], "{vector:?}");
        let mut once = whole.clone();
        once.sort_unstable();
        once.dedup();
        assert_eq!(once.len(), whole.len(), "no row twice");
        // The other form of a search has the same order, but for equal scores, which it leaves to the caller.
        let other = self.index.query(vector, 1_000).await.unwrap();
        let scores: Vec<f32> = other.iter().map(|found| found.score).collect();
        let whole = self.search("term", vector, 0, 1_000).await;
        let of_whole: Vec<f32> = whole.iter().map(|found| found.score.unwrap()).collect();
        assert_eq!(scores, of_whole);
    }
}

fn ids(found: &[Found]) -> Vec<i64> {
    found.iter().map(|found| found.product.id).collect()
}

#[tokio::test]
async fn a_row_unlike_all_others_is_found_though_its_list_is_not_read() {
    let shop = Shop::listed().await;
    shop.write(STRAY, "stray", STRAY_VECTOR).await;
    let missed = shop.first(&QUERY).await;
    assert!(!missed.contains(&STRAY), "nothing is learnt yet: {missed:?}");
    assert_eq!(shop.second_looks(), [0, 0]);

    // The check compares the vectors that are there.
    shop.check().await;
    assert!(shop.outliers().await.contains(&STRAY.to_string()));
    assert_eq!(shop.first(&QUERY).await, [STRAY; 2]);
    assert_eq!(shop.second_looks(), [2, 0]);
    // The best match of a question about the other products is not weak.
    assert_eq!(shop.first(&[0.0, 1.0, 0.0]).await, [PRODUCTS / 4; 2]);
    assert_eq!(shop.second_looks(), [2, 0]);
    // A question about nothing in the table.
    shop.first(&[0.5, 0.0, -0.9]).await;
    assert_eq!(shop.second_looks(), [2, 2]);

    // A later write compares its vector itself.
    let vector = [0.0, 0.2, -0.98];
    shop.write(STRAY + 1, "another one", vector).await;
    assert_eq!(shop.first(&[0.0, -0.2, -0.98]).await, [STRAY + 1; 2]);
    // It gets a text like the others, and the first one goes.
    let landmark = "SELECT embedding FROM refarch.landmark LIMIT 1";
    let landmark: Vec<f32> = shop.it.client.query_one(landmark, &[]).await.unwrap().get(0);
    shop.write(STRAY + 1, "like the others", landmark.try_into().unwrap()).await;
    shop.run(&format!("DELETE FROM {} WHERE id = '{STRAY}'", Shop::vectors(&shop.generation))).await;
    assert!(shop.first(&QUERY).await.iter().all(|id| *id <= PRODUCTS));
    shop.check().await;
    let left = shop.outliers().await;
    assert!(left.iter().all(|id| id.parse::<i64>().unwrap() <= PRODUCTS), "{left:?}");
    // The record of the lists goes, and what was learnt.
    shop.run("DELETE FROM refarch.search_index").await;
    assert!(shop.outliers().await.is_empty());
}

#[tokio::test]
async fn most_vectors_are_no_outliers() {
    let shop = Shop::listed().await;
    shop.check().await;
    let outliers = shop.outliers().await.len();
    assert!(outliers < PRODUCTS as usize / 4, "{outliers} of {PRODUCTS} equally similar products");
    let sql = "SELECT outliers, outlier_below, weak_below, (SELECT count(*) FROM refarch.landmark) FROM refarch.search_index";
    let row = shop.it.client.query_one(sql, &[]).await.unwrap();
    assert_eq!(row.get::<_, Option<i64>>(0), Some(outliers as i64));
    let (outlier_below, weak_below): (f32, f32) = (row.get(1), row.get(2));
    assert!((0.0..1.0).contains(&outlier_below) && (0.9..1.0).contains(&weak_below));
    assert!((1..=32).contains(&row.get::<_, i64>(3)));
}

#[tokio::test]
async fn pages_continue_the_ranking_as_it_was_seen() {
    let equal = "UPDATE products_with_increment SET description = 'the same'";
    for method in [SearchMethod::Exact, SearchMethod::Lists, SearchMethod::Graph] {
        let shop = Shop::new(method).await;
        // Hundreds of rows have the same vector.
        let vectors = Shop::vectors(&shop.generation);
        shop.run(equal).await;
        shop.run(&format!(
            "UPDATE {vectors} SET embedding = '[0,-1,0]' WHERE id::bigint BETWEEN 700 AND 1100"
        ))
        .await;
        shop.write(STRAY, "stray", STRAY_VECTOR).await;
        while shop.index.maintain(0).await.unwrap() {}
        // Few lists are read at first, and further ones for further pages.
        shop.run("UPDATE refarch.search_index SET probes = 1").await;
        for vector in [[1.0, 0.02, 0.0], [0.3, 0.9, 0.1], [-0.6, 0.7, 0.0], [0.0, -1.0, 0.0], QUERY] {
            shop.assert_pages_agree(&vector).await;
        }
    }
}

#[tokio::test]
async fn exact_matches_come_first_in_one_order() {
    let shop = Shop::listed().await;
    shop.write(STRAY, "stray", STRAY_VECTOR).await;
    shop.check().await;
    // Names that are a SKU: of products that are among the nearest, and of products that are not.
    shop.run(
        "UPDATE products_with_increment SET name = 'sku-7' WHERE id IN (9, 300, 310, 900); \
         DELETE FROM products_with_increment WHERE id = 305",
    )
    .await;
    let near = [0.0, 1.0, 0.0];
    let first = shop.search("Sku-7", &near, 0, 10).await;
    assert_eq!(ids(&first)[..5], [7, 9, 300, 310, 900], "{first:?}");
    let exact: Vec<Option<Exact>> = first.iter().map(|found| found.exact).collect();
    let name = Some(Exact::Name);
    assert_eq!(exact[..6], [Some(Exact::Sku), name, name, name, name, None]);
    assert_eq!((first[0].score, first[1].score), (None, None), "they are not among the nearest");
    assert!(first[2].score > first[3].score, "{first:?}");
    // A search in several statements puts them in this order too.
    let several: Vec<i64> =
        shop.products.exact("Sku-7").await.unwrap().unwrap().iter().map(|(id, _)| *id).collect();
    assert_eq!(several, ids(&first)[..5]);
    // Each row comes once, and none that was deleted.
    let all = ids(&shop.search("Sku-7", &near, 0, 200).await);
    assert!(!all.contains(&305));
    let mut once = all.clone();
    once.sort_unstable();
    once.dedup();
    assert_eq!(once.len(), all.len());

    // There is an exact match, so a weak match is no reason for a second look.
    let looks = shop.second_looks();
    let found = shop.search("Sku-7", &QUERY, 0, 10).await;
    assert!(!ids(&found).contains(&STRAY), "{found:?}");
    assert_eq!(shop.second_looks(), looks);
}
