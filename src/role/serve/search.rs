//! A search: exact matches first, then by meaning.

use std::collections::HashSet;
use std::time::Instant;

use serde::Serialize;

use super::app::App;
use super::error::ApiError;
use crate::backend::postgres::products::{Exact, Found};
use crate::product::Product;

/// Ranked rows that paging can reach. Every page is cut from a ranking of this depth, because an approximate
/// index may order the same rows differently for another depth.
const TOP: usize = 1_000;

/// Most characters of a search term. The model reads at most 256 tokens.
const MAX_TERM: usize = 2_000;

/// Why a row is in the results.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MatchKind {
    /// Its SKU is the term.
    Sku,
    /// Its name is the term.
    Name,
    /// Its text means something similar.
    Semantic,
}

/// A row with the reason for its rank.
#[derive(Clone, Debug, Serialize)]
pub struct Hit {
    /// The row.
    #[serde(flatten)]
    pub product: Product,
    /// Cosine similarity to the term; none for an exact match that is not among the nearest.
    pub score: Option<f32>,
    /// Why the row is in the results.
    #[serde(rename = "match")]
    pub kind: MatchKind,
}

impl From<Exact> for MatchKind {
    fn from(exact: Exact) -> Self {
        match exact {
            Exact::Sku => Self::Sku,
            Exact::Name => Self::Name,
        }
    }
}

impl From<Found> for Hit {
    fn from(found: Found) -> Self {
        let kind = found.exact.map_or(MatchKind::Semantic, MatchKind::from);
        Self { product: found.product, score: found.score, kind }
    }
}

/// A page of results.
#[derive(Clone, Debug, Serialize)]
pub struct Results {
    /// The term.
    pub query: String,
    /// The page, from 1.
    pub page: u64,
    /// Rows on a page.
    pub per_page: u64,
    /// Whether there are more pages.
    pub has_next: bool,
    /// How long the search took, in milliseconds.
    pub took_ms: u64,
    /// The rows, best first.
    pub rows: Vec<Hit>,
}

/// A row's place in the ranking.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Ranked {
    pub id: i64,
    pub score: Option<f32>,
    pub kind: MatchKind,
}

/// Searches for a term.
pub async fn search(app: &App, term: &str, page: u64, per_page: u64) -> Result<Results, ApiError> {
    let started = Instant::now();
    let term = check(term)?;
    let first = usize::try_from((page - 1).saturating_mul(per_page)).unwrap_or(usize::MAX);
    let results = |has_next, rows| Results {
        query: term.into(),
        page,
        per_page,
        has_next,
        took_ms: started.elapsed().as_millis() as u64,
        rows,
    };
    // No ranking is that long.
    if first >= TOP {
        return Ok(results(false, Vec::new()));
    }
    let _permit = app.permit(&app.searches).await?;
    let vector = app.query_cache.embed(&*app.embedder, term).await?;
    // A second permit, because a slow embedder needs no connection.
    let _query = app.permit(&app.queries).await?;
    let count = (per_page as usize).min(TOP - first);
    // One more, to know whether there are more pages.
    if let Some(mut found) = app.products.search(term, &vector, first, count + 1).await? {
        let has_next = found.len() > count && first + count < TOP;
        found.truncate(count);
        return Ok(results(has_next, found.into_iter().map(Hit::from).collect()));
    }
    let ranked = rank(app, term, &vector).await?;
    let start = first.min(ranked.len());
    let end = start.saturating_add(per_page as usize).min(ranked.len());
    let here = &ranked[start..end];
    let ids: Vec<i64> = here.iter().map(|hit| hit.id).collect();
    let products = app.products.by_ids(&ids).await?;
    let rows = products
        .into_iter()
        .filter_map(|product| {
            let ranked = here.iter().find(|ranked| ranked.id == product.id)?;
            Some(Hit { product, score: ranked.score, kind: ranked.kind })
        })
        .collect();
    Ok(results(end < ranked.len(), rows))
}

/// The trimmed term, if it can be searched for.
fn check(term: &str) -> Result<&str, ApiError> {
    let term = term.trim();
    if term.is_empty() {
        return Err(ApiError::bad_request("q is empty: give a search term"));
    }
    let length = term.chars().count();
    if length > MAX_TERM {
        return Err(ApiError::bad_request(format!("q has {length} characters; use at most {MAX_TERM}")));
    }
    Ok(term)
}

/// Ranks the rows that the table still has.
async fn rank(app: &App, term: &str, vector: &[f32]) -> Result<Vec<Ranked>, ApiError> {
    let (exact, nearest) = tokio::try_join!(app.products.exact(term), app.index.query(vector, TOP))?;
    let nearest = nearest
        .into_iter()
        // An id that is not a number belongs to another table.
        .filter_map(|found| Some((found.id.parse().ok()?, found.score)))
        .collect::<Vec<(i64, f32)>>();
    let ids: Vec<i64> = nearest.iter().map(|(id, _)| *id).collect();
    let exact = match exact {
        Some(exact) => exact,
        None => app.products.exact_among(term, &ids).await?,
    };
    Ok(merge(&exact, &nearest, &app.products.existing(&ids).await?))
}

/// Exact matches first, in their order. Then the nearest rows that still exist and are no exact match, in the order of
/// the index; equal scores by id.
fn merge(exact: &[(i64, Exact)], nearest: &[(i64, f32)], existing: &HashSet<i64>) -> Vec<Ranked> {
    let score = |id| nearest.iter().find(|(near, _)| *near == id).map(|(_, score)| *score);
    let mut seen = HashSet::new();
    let exact = exact.iter().map(|(id, exact)| Ranked { id: *id, score: score(*id), kind: (*exact).into() });
    let mut nearest: Vec<&(i64, f32)> = nearest.iter().filter(|(id, _)| existing.contains(id)).collect();
    for equal in nearest.chunk_by_mut(|(_, a), (_, b)| a.total_cmp(b).is_eq()) {
        equal.sort_by_key(|(id, _)| *id);
    }
    let nearest = nearest.into_iter().map(|(id, score)| Ranked {
        id: *id,
        score: Some(*score),
        kind: MatchKind::Semantic,
    });
    exact.chain(nearest).filter(|ranked| seen.insert(ranked.id)).take(TOP).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exact_matches_come_first_and_no_row_twice() {
        let nearest = [(1, 0.9), (5, 0.8), (3, 0.7), (2, 0.7), (8, 0.6)];
        let merged = merge(&[(5, Exact::Sku), (9, Exact::Name)], &nearest, &[1, 2, 3, 5].into());
        let short: Vec<_> = merged.iter().map(|ranked| (ranked.id, ranked.kind, ranked.score)).collect();
        assert_eq!(
            short,
            [
                (5, MatchKind::Sku, Some(0.8)),
                (9, MatchKind::Name, None),
                (1, MatchKind::Semantic, Some(0.9)),
                (2, MatchKind::Semantic, Some(0.7)),
                (3, MatchKind::Semantic, Some(0.7))
            ]
        );
    }
}
