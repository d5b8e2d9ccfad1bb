//! Casts that a read of the table's columns may run.
//!
//! A read has the rights of the reading role. A cast may be a function, and the owner of a type may create
//! casts of that type. So through a cast, the owner of a table could do what only refarch's roles may do. A
//! read may run functions that are PostgreSQL's own or belong to superusers, to the role that migrated, or to
//! the reading role. Casts by any other function are refused.

use tokio_postgres::GenericClient;

use crate::backend::postgres::failure;
use crate::config;
use crate::pipeline::failure::Result;

/// Casts between the columns' types, or types that these consist of, and the types that the columns are read
/// as; and casts that PostgreSQL runs implicitly. Each with its setting, its column, the cast, and the
/// function's owner.
const BY_OTHERS: &str = "WITH RECURSIVE used AS ( \
      SELECT w.setting, w.name, w.place, a.atttypid AS oid \
      FROM unnest($2::text[], $3::text[]) WITH ORDINALITY AS w(setting, name, place) \
      JOIN pg_catalog.pg_attribute a ON a.attrelid = $1 AND a.attname = w.name AND NOT a.attisdropped \
      UNION \
      SELECT u.setting, u.name, u.place, k.oid FROM used u JOIN pg_catalog.pg_type t ON t.oid = u.oid CROSS JOIN LATERAL ( \
        SELECT t.typbasetype UNION ALL SELECT t.typelem \
        UNION ALL SELECT r.rngsubtype FROM pg_catalog.pg_range r WHERE t.oid IN (r.rngtypid, r.rngmultitypid) \
        UNION ALL SELECT a.atttypid FROM pg_catalog.pg_attribute a \
                  WHERE a.attrelid = t.typrelid AND t.typrelid <> 0 AND a.attnum > 0 AND NOT a.attisdropped) k(oid) \
      WHERE k.oid <> 0) \
    SELECT u.setting, u.name, format_type(k.castsource, NULL), format_type(k.casttarget, NULL), o.rolname::text \
    FROM used u JOIN pg_catalog.pg_cast k ON \
        k.castsource = u.oid AND (k.castcontext = 'i' OR k.casttarget IN ('text'::regtype, 'json'::regtype, 'jsonb'::regtype)) \
        OR k.casttarget = u.oid AND k.castsource = 'text'::regtype \
    JOIN pg_catalog.pg_proc p ON p.oid = k.castfunc JOIN pg_catalog.pg_roles o ON o.oid = p.proowner \
    WHERE p.pronamespace <> 'pg_catalog'::regnamespace AND NOT o.rolsuper AND o.rolname <> current_user \
      AND NOT EXISTS (SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
                      WHERE n.nspname = 'refarch' AND c.relname = 'source' AND c.relowner = p.proowner) \
    ORDER BY u.place, k.oid LIMIT 1";

/// The message about the first cast in a read of these columns that would run another role's function.
/// `None`: there is no such cast.
pub(super) async fn refused(
    client: &impl GenericClient,
    relation: u32,
    source: &config::Source,
) -> Result<Option<String>> {
    let settings = [
        ("source.id", std::slice::from_ref(&source.id)),
        ("source.text", &source.text),
        ("source.metadata", &source.metadata),
    ];
    let (settings, names): (Vec<&str>, Vec<&str>) = settings
        .into_iter()
        .flat_map(|(setting, names)| names.iter().map(move |name| (setting, name.as_str())))
        .unzip();
    let row = client
        .query_opt(BY_OTHERS, &[&relation, &settings, &names])
        .await
        .map_err(|error| failure("look for casts of the table's columns", error))?;
    Ok(row.map(|row| {
        let [setting, name, from, to, owner] = [0, 1, 2, 3, 4].map(|at| row.get::<_, String>(at));
        format!(
            "reading its column {name:?} ({setting}) would run the cast ({from} AS {to}), whose function belongs to another role, {owner}: drop that cast, or ALTER FUNCTION ... OWNER TO the role that migrates"
        )
    }))
}
