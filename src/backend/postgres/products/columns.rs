//! The columns of the reference architecture's table, as they are read.

/// The columns that a reader sees, in the same form whatever the role's `DateStyle`. `xmin` changes with
/// every write to the row.
pub(super) const COLUMNS: &str = "p.id::bigint, p.name::text, p.sku::text, p.description, p.price::text, \
                       to_char(p.last_updated, 'YYYY-MM-DD'), p.xmin::text";

/// The columns in the reference architecture's responses. Its driver turns dates into timestamps, and its
/// clients expect that.
pub(super) const LEGACY: &str = "jsonb_build_object('id', p.id, 'name', p.name, 'sku', p.sku, 'description', p.description, \
                      'created_at', to_char(p.created_at, 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"'), 'price', p.price, \
                      'last_updated', to_char(p.last_updated, 'YYYY-MM-DD\"T00:00:00.000Z\"'), 'uuid', p.uuid)";

/// Whether an index `i` of `pg_index` serves a search for `lower` of the column `k.column_name`, as SQL.
pub const INDEXES_LOWER_CASE: &str = "i.indisvalid AND i.indpred IS NULL AND i.indnatts = 1 \
    AND pg_get_expr(i.indexprs, i.indrelid) IN ('lower((' || k.column_name || ')::text)', 'lower(' || k.column_name || ')')";
