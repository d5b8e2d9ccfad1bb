//! Pages of listings and searches, as requests ask for them.

use serde::Deserialize;

use super::app::App;
use super::error::ApiError;
use crate::backend::postgres::products::Place;

/// Greatest page number, so that row offsets cannot overflow.
pub(super) const MAX_PAGE: u64 = 1_000_000_000;

/// What a listing or a search says about pages, as it came.
#[derive(Deserialize)]
pub(super) struct Paging {
    pub(super) q: Option<String>,
    pub(super) page: Option<String>,
    per_page: Option<String>,
    after: Option<String>,
    before: Option<String>,
}

impl Paging {
    /// The page number and the rows on a page, checked. They are text so that an error can show them.
    pub(super) fn resolve(&self, app: &App) -> Result<(u64, u64), ApiError> {
        let number = |name: &str, given: &Option<String>, default: u64, most: u64| match given {
            None => Ok(default),
            Some(text) => text.parse().ok().filter(|value| (1..=most).contains(value)).ok_or_else(|| {
                ApiError::bad_request(format!("{name}={text}: use a whole number from 1 to {most}"))
            }),
        };
        Ok((
            number("page", &self.page, 1, MAX_PAGE)?,
            number("per_page", &self.per_page, app.page_size, 100)?,
        ))
    }

    /// The id after or before which rows are asked for.
    pub(super) fn cursor(&self) -> Result<Option<Place>, ApiError> {
        let id = |name: &str, text: &str| {
            text.parse().map_err(|_| {
                ApiError::bad_request(format!("{name}={text}: use the id of a row, a whole number"))
            })
        };
        Ok(match (&self.after, &self.before) {
            (None, None) => None,
            (Some(text), None) => Some(Place::After(id("after", text)?)),
            (None, Some(text)) => Some(Place::Before(id("before", text)?)),
            (Some(_), Some(_)) => return Err(ApiError::bad_request("use one of page, after and before")),
        })
    }
}
