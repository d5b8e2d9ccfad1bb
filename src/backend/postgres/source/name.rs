//! A table's name in the settings: plain, or quoted as in SQL.

use tokio_postgres::GenericClient;

use crate::backend::postgres::failure;
use crate::pipeline::failure::{Error, FailureKind, Result};

/// The schema that is searched for a table without a schema, after the role's own search path.
const USUAL_SCHEMA: &str = "public";

/// How many tables a missing name is compared with.
const MAX_COMPARED: i64 = 10_000;

/// How similar a name must be to be suggested, from 0 to 1, and how many names are suggested.
const NEAR: f64 = 0.75;
const MAX_MENTIONED: usize = 3;

/// A table that exists.
pub(super) struct Found {
    pub(super) schema: String,
    pub(super) table: String,
    /// As in `pg_class.relkind`.
    pub(super) kind: String,
}

/// One possible meaning of a name: schema and table.
type Reading = (Option<String>, String);

/// Finds the table with this name.
pub(super) async fn find(client: &impl GenericClient, name: &str) -> Result<Found> {
    let fail = |error: tokio_postgres::Error| failure("look the source table up", error);
    let wrong = |message: String| {
        Error::new(FailureKind::WrongSetting, format!("check source.table = {name}"), message)
    };
    let readings = readings(name).map_err(wrong)?;
    let mut searched = Vec::new();
    if readings.iter().any(|(schema, _)| schema.is_none()) {
        searched = search_path(client).await?;
    }
    for (schema, table) in &readings {
        let schemas = schema.as_ref().map_or(searched.as_slice(), std::slice::from_ref);
        let row = client
            .query_opt(
                "SELECT n.nspname, c.relname, c.relkind::text FROM unnest($1::text[]) WITH ORDINALITY AS s(name, ordinal) \
                 JOIN pg_catalog.pg_namespace n ON n.nspname = s.name JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid \
                 WHERE c.relname = $2 AND c.relkind IN ('r', 'p', 'v', 'm', 'f') ORDER BY s.ordinal LIMIT 1",
                &[&schemas, &table],
            )
            .await
            .map_err(fail)?;
        if let Some(row) = row {
            return Ok(Found { schema: row.get(0), table: row.get(1), kind: row.get(2) });
        }
    }
    let mut message = "there is no such table".to_owned();
    if !searched.is_empty() {
        message = format!("{message} in {}", searched.join(", "));
    }
    let near = nearest(client, &readings).await?;
    if !near.is_empty() {
        message = format!("{message}; similar names: {}", near.join(", "));
    }
    Err(wrong(message))
}

/// Schemas that are searched for a table without a schema. The session has a search path of ours. To read the
/// role's own search path, this function sets it for a moment.
async fn search_path(client: &impl GenericClient) -> Result<Vec<String>> {
    let fail = |error: tokio_postgres::Error| failure("read the role's search path", error);
    let ours: String =
        client.query_one("SELECT pg_catalog.current_setting('search_path')", &[]).await.map_err(fail)?.get(0);
    client
        .execute(
            "SELECT pg_catalog.set_config('search_path', reset_val, true) FROM pg_catalog.pg_settings WHERE name = 'search_path'",
            &[],
        )
        .await
        .map_err(fail)?;
    let mut schemas: Vec<String> =
        client.query_one("SELECT pg_catalog.current_schemas(false)::text[]", &[]).await.map_err(fail)?.get(0);
    client.execute("SELECT pg_catalog.set_config('search_path', $1, true)", &[&ours]).await.map_err(fail)?;
    if !schemas.iter().any(|schema| schema == USUAL_SCHEMA) {
        schemas.push(USUAL_SCHEMA.into());
    }
    Ok(schemas)
}

/// Possible meanings of a name, the likeliest first. A name with a double quote is read as SQL reads it. A
/// name without is taken literally first, so that unusual letters need no quotes, and then in lower case.
fn readings(name: &str) -> Result<Vec<Reading>, String> {
    let plain: Reading = match name.split_once('.') {
        Some((schema, table)) => (Some(schema.to_owned()), table.to_owned()),
        None => (None, name.to_owned()),
    };
    if name.contains('"') {
        return match as_sql(name)?.as_slice() {
            [table] => Ok(vec![(None, table.clone())]),
            [schema, table] => Ok(vec![(Some(schema.clone()), table.clone())]),
            _ => Err("it has too many parts: name the table as schema.table".into()),
        };
    }
    let small = (plain.0.as_ref().map(|schema| schema.to_lowercase()), plain.1.to_lowercase());
    Ok(vec![plain, small])
}

/// The parts of a name between its dots: quoted parts literally, the rest in lower case.
fn as_sql(name: &str) -> Result<Vec<String>, String> {
    let mut parts = Vec::new();
    let mut rest = name.trim();
    loop {
        let (part, after) = if let Some(quoted) = rest.strip_prefix('"') {
            let mut part = String::new();
            let mut letters = quoted.char_indices().peekable();
            let end = loop {
                match letters.next() {
                    None => return Err("a double quote is missing".into()),
                    Some((at, '"')) => {
                        if letters.next_if(|(_, next)| *next == '"').is_none() {
                            break at + 1;
                        }
                        part.push('"');
                    }
                    Some((_, letter)) => part.push(letter),
                }
            };
            (part, &quoted[end..])
        } else {
            let end = rest.find('.').unwrap_or(rest.len());
            if rest[..end].contains('"') {
                return Err(
                    "a double quote is missing: quote each part as a whole, as in public.\"My Table\"".into(),
                );
            }
            (rest[..end].trim().to_lowercase(), &rest[end..])
        };
        if part.is_empty() {
            return Err("a part of the name is empty".into());
        }
        parts.push(part);
        match after.trim_start() {
            "" => return Ok(parts),
            after => {
                rest = after
                    .strip_prefix('.')
                    .ok_or_else(|| format!("{after:?} follows a quoted part"))?
                    .trim_start();
            }
        }
    }
}

/// Tables with similar names, quoted as in SQL.
async fn nearest(client: &impl GenericClient, readings: &[Reading]) -> Result<Vec<String>> {
    let rows = client
        .query(
            "SELECT n.nspname, c.relname, pg_catalog.format('%I.%I', n.nspname, c.relname) \
             FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
             WHERE c.relkind IN ('r', 'p') AND n.nspname NOT IN ('information_schema', 'pgmq', 'refarch') \
               AND n.nspname NOT LIKE 'pg\\_%' ORDER BY 1, 2 LIMIT $1",
            &[&MAX_COMPARED],
        )
        .await
        .map_err(|error| failure("look for tables with similar names", error))?;
    let mut near: Vec<(f64, String)> = rows
        .iter()
        .filter_map(|row| {
            let (schema, table): (String, String) = (row.get(0), row.get(1));
            let alike = readings.iter().map(|(wanted, name)| {
                let schemas =
                    wanted.as_ref().is_none_or(|wanted| wanted.to_lowercase() == schema.to_lowercase());
                let names = strsim::jaro_winkler(&name.to_lowercase(), &table.to_lowercase());
                if schemas { names } else { names * 0.9 }
            });
            let alike = alike.fold(0.0, f64::max);
            (alike >= NEAR).then(|| (alike, row.get(2)))
        })
        .collect();
    near.sort_by(|(one, _), (other, _)| other.total_cmp(one));
    Ok(near.into_iter().take(MAX_MENTIONED).map(|(_, name)| name).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_quotes_is_read_as_sql_reads_it() {
        let parts = |name: &str| as_sql(name);
        assert_eq!(parts("Public.\"We ird\"").unwrap(), ["public", "We ird"]);
        assert_eq!(parts("\"a.b\" . \"c\"\"d\"").unwrap(), ["a.b", "c\"d"]);
        assert_eq!(parts("\"x\"").unwrap(), ["x"]);
        assert_eq!(parts("a.b.c").unwrap(), ["a", "b", "c"]);
        for wrong in ["\"open", "a\"b", "\"a\"b", "\"\"", "a.", "public.We \"ird\""] {
            assert!(parts(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_name_without_quotes_is_itself_before_it_is_in_small_letters() {
        let (schema, small) = (Some("Public".to_owned()), Some("public".to_owned()));
        assert_eq!(readings("Public.We ird").unwrap(), [(schema, "We ird".into()), (small, "we ird".into())]);
        assert_eq!(readings("\"T\"").unwrap(), [(None, "T".into())]);
    }
}
