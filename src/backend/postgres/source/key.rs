//! The type of ids, and how ids are compared.
//!
//! A cast must cut nothing. So the type is named `pg_catalog.bpchar`, which is of any length, and not
//! `character`, which without a length is one character long. An operator is named with its schema, since the
//! search path is only `pg_catalog`, and an extension's operators are in the extension's schema.

use tokio_postgres::GenericClient;

use super::quote::quote_ident;
use crate::backend::postgres::failure;
use crate::pipeline::failure::Result;

/// Finds the base type under any domains, the type of its default order (`text` for `varchar`), and that
/// order's operators for "equal" and "greater". The numbers are strategies of btree.
const FIND: &str = "WITH RECURSIVE base AS ( \
      SELECT t.oid, t.typtype, t.typbasetype FROM pg_catalog.pg_type t WHERE t.oid = $1 \
      UNION ALL SELECT t.oid, t.typtype, t.typbasetype FROM base b JOIN pg_catalog.pg_type t ON t.oid = b.typbasetype \
      WHERE b.typtype = 'd'), \
    plain AS (SELECT t.* FROM base b JOIN pg_catalog.pg_type t ON t.oid = b.oid WHERE b.typtype <> 'd') \
    SELECT pg_catalog.format_type(t.oid, NULL), t.typcategory = 'A' OR t.typtype IN ('c', 'p'), c.schema, c.type, \
           c.equal_schema, c.equal, c.greater_schema, c.greater \
    FROM plain t LEFT JOIN LATERAL ( \
      SELECT n.nspname AS schema, k.typname AS type, en.nspname AS equal_schema, e.oprname AS equal, \
             gn.nspname AS greater_schema, g.oprname AS greater \
      FROM pg_catalog.pg_opclass o \
      JOIN pg_catalog.pg_am m ON m.oid = o.opcmethod AND m.amname = 'btree' \
      JOIN pg_catalog.pg_type i ON i.oid = o.opcintype \
      JOIN pg_catalog.pg_type k ON k.oid = CASE i.typtype WHEN 'p' THEN t.oid ELSE i.oid END \
      JOIN pg_catalog.pg_namespace n ON n.oid = k.typnamespace \
      JOIN pg_catalog.pg_amop ea ON ea.amopfamily = o.opcfamily AND ea.amopstrategy = 3 \
           AND ea.amoplefttype = i.oid AND ea.amoprighttype = i.oid \
      JOIN pg_catalog.pg_operator e ON e.oid = ea.amopopr JOIN pg_catalog.pg_namespace en ON en.oid = e.oprnamespace \
      JOIN pg_catalog.pg_amop ga ON ga.amopfamily = o.opcfamily AND ga.amopstrategy = 5 \
           AND ga.amoplefttype = i.oid AND ga.amoprighttype = i.oid \
      JOIN pg_catalog.pg_operator g ON g.oid = ga.amopopr JOIN pg_catalog.pg_namespace gn ON gn.oid = g.oprnamespace \
      WHERE o.opcdefault AND (i.oid = t.oid \
        OR (t.typtype, i.typname) IN (('e', 'anyenum'), ('r', 'anyrange'), ('m', 'anymultirange')) \
        OR EXISTS (SELECT FROM pg_catalog.pg_cast b WHERE b.castsource = t.oid AND b.casttarget = i.oid \
                   AND b.castmethod = 'b' AND b.castcontext = 'i')) \
      ORDER BY i.oid = t.oid DESC, i.typispreferred DESC, i.oid LIMIT 1) c ON true";

/// How ids are cast and compared.
#[derive(Clone, Debug)]
pub(super) struct Key {
    schema: String,
    name: String,
    /// The operators, with their schemas.
    pub(super) equal: String,
    pub(super) greater: String,
}

impl Key {
    /// Looks a column's type up. The inner error completes the sentence "the column ...".
    pub(super) async fn find(client: &impl GenericClient, type_id: u32) -> Result<Result<Self, String>> {
        let row = client
            .query_one(FIND, &[&type_id])
            .await
            .map_err(|error| failure("look the id column's type up", error))?;
        let name: String = row.get(0);
        if row.get(1) {
            return Ok(Err(format!(
                "is of type {name}: an array or a row of values cannot be an id; name another column"
            )));
        }
        let Some(schema) = row.get(2) else {
            return Ok(Err(format!(
                "is of type {name}, which has no default order (no default btree operator class), so the rows cannot be read in order: name another column"
            )));
        };
        let operator =
            |at: usize| format!("OPERATOR({}.{})", quote_ident(row.get(at)), row.get::<_, String>(at + 1));
        Ok(Ok(Self { schema, name: row.get(3), equal: operator(4), greater: operator(6) }))
    }

    /// The type, schema-qualified and quoted.
    pub(super) fn sql_type(&self) -> String {
        format!("{}.{}", quote_ident(&self.schema), quote_ident(&self.name))
    }

    /// Whether the type may hold this text. False is certain; of most types only PostgreSQL knows, and this
    /// is true.
    pub(super) fn can_hold(&self, id: &str) -> bool {
        let built_in = if self.schema == "pg_catalog" { self.name.as_str() } else { "" };
        match built_in {
            "int2" => id.parse::<i16>().is_ok(),
            "int4" => id.parse::<i32>().is_ok(),
            "int8" => id.parse::<i64>().is_ok(),
            "uuid" => {
                id.len() == 36
                    && id.bytes().enumerate().all(|(at, byte)| match at {
                        8 | 13 | 18 | 23 => byte == b'-',
                        _ => byte.is_ascii_hexdigit(),
                    })
            }
            _ => !id.contains('\0'),
        }
    }
}
