//! The search of a page, in one statement, through lists that miss a text unlike all others.

use std::sync::Arc;

use refarch::backend::pgvector::PgVectorOptions;
use refarch::backend::postgres::products::{Exact, Found, Products};

use crate::common::source::{Migrated, graph_options, settings};

/// Products 1 to 60 lie around the first axis, 101 to 160 around the second one, one list each. The stray one lies
/// elsewhere, a little nearer to the first axis.
const STRAY: i64 = 500;
const STRAY_VECTOR: &str = "[0.2,0,0.98]";

/// Near the stray product, and a little nearer to the second axis: a search of one list reads the other one.
const QUERY: [f32; 3] = [0.0, 0.2, 0.98];

/// Products with their vectors in two lists, of which a search reads one.
async fn listed(exact_below: f64) -> (Migrated, Products) {
    let it = Migrated::new("", settings(&[]), "pgvector").await;
    let generation = it.generation().await;
    let vectors = format!("refarch.vector_{}", generation.id);
    let lists = format!(
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET enable_seqscan = off', current_database()); END $$; \
         INSERT INTO products_with_increment (id, name, sku, description) \
           SELECT i, 'name ' || i, 'SKU-' || i, 'text' FROM generate_series(1, 160) i WHERE i <= 60 OR i > 100; \
         INSERT INTO {vectors} (id, embedding, content_hash) \
           SELECT id::text, CASE WHEN id <= 60 THEN ARRAY[1, id / 10000.0, 0] ELSE ARRAY[id / 10000.0, 1, 0] END::real[]::halfvec, '' \
           FROM products_with_increment; \
         CREATE INDEX {vectors_name}_lists ON {vectors} USING ivfflat (embedding halfvec_cosine_ops) WITH (lists = 2); \
         INSERT INTO refarch.search_index (target, lists, probes, probes_at_build, rows, build_ms, built_writes) \
           VALUES ({target}, 2, 1, 1, 120, 0, 0); \
         INSERT INTO products_with_increment (id, name, sku) VALUES ({STRAY}, 'stray', 'stray'); \
         INSERT INTO {vectors} (id, embedding, content_hash) VALUES ('{STRAY}', '{STRAY_VECTOR}', '')",
        vectors_name = vectors.trim_start_matches("refarch."),
        target = generation.id,
    );
    it.client.batch_execute(&lists).await.unwrap();
    let index = it.pgvector_with(&generation, PgVectorOptions { exact_below, ..graph_options(1_000) });
    let products =
        Products::new(it.postgres.pool.clone(), &generation.table.relation).with_vectors(Arc::new(index));
    (it, products)
}

async fn search(products: &Products, term: &str, offset: usize, count: usize) -> Vec<Found> {
    products.search(term, &QUERY, offset, count).await.unwrap().expect("one statement")
}

fn ids(found: &[Found]) -> Vec<i64> {
    found.iter().map(|found| found.product.id).collect()
}

#[tokio::test]
async fn a_search_whose_best_score_is_low_is_repeated_over_all_vectors() {
    let (_it, products) = listed(-1.0).await;
    let missed = search(&products, "term", 0, 3).await;
    assert!(ids(&missed).iter().all(|id| (101..=160).contains(id)), "one list is read: {missed:?}");
    assert!(missed[0].score.is_some_and(|score| score < 0.42), "{missed:?}");

    let (_it, products) = listed(0.42).await;
    let found = search(&products, "term", 0, 3).await;
    assert_eq!(found[0].product.id, STRAY, "{found:?}");
    assert!(found[0].score.is_some_and(|score| score > 0.9), "{found:?}");
    // A search that found something like the term is not repeated.
    let near = products.search("term", &[0.0, 1.0, 0.0], 0, 50).await.unwrap().expect("one statement");
    assert!(ids(&near).iter().all(|id| (101..=160).contains(id)), "{near:?}");
}

#[tokio::test]
async fn exact_matches_come_before_the_nearest_of_the_lists() {
    let (it, products) = listed(0.42).await;
    // Two names are a SKU: of a product in the list that is read, which gets a score, and of one in the other list.
    it.client
        .batch_execute(
            "UPDATE products_with_increment SET name = 'sku-7' WHERE id IN (9, 130); \
             DELETE FROM products_with_increment WHERE id = 140",
        )
        .await
        .unwrap();
    let first = search(&products, "Sku-7", 0, 10).await;
    assert_eq!(ids(&first)[..3], [7, 130, 9], "{first:?}");
    let exact: Vec<Option<Exact>> = first.iter().map(|found| found.exact).collect();
    assert_eq!(exact[..4], [Some(Exact::Sku), Some(Exact::Name), Some(Exact::Name), None]);
    assert_eq!((first[0].score, first[2].score), (None, None), "they are not among the nearest");
    assert!(first[1].score.is_some(), "{first:?}");
    // There is an exact match, so the low scores are no reason to search all vectors.
    assert!(!ids(&first).contains(&STRAY));

    // Pages of one ranking (its first fifty rows): each row once, best first, none that was deleted.
    let mut all = first;
    for offset in [10, 20, 30, 40] {
        all.extend(search(&products, "Sku-7", offset, 10).await);
    }
    let mut once = ids(&all);
    once.sort_unstable();
    once.dedup();
    assert_eq!(once.len(), all.len(), "no row twice");
    assert!(!once.contains(&140), "{once:?}");
    assert!(all[3..].is_sorted_by(|a, b| a.score >= b.score), "{all:?}");
    assert!(all[3..].iter().all(|found| (101..=160).contains(&found.product.id)), "{all:?}");
}
