//! `[database]`, `[source]`, `[runtime]` and `[log]`

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use toml::Value;

use super::declare::Rule::{Is, Variable};
use super::declare::number;
use super::read::section;
use crate::secret::Secret;

section! {
    /// `[database]`: where the source and the books about it are.
    pub struct Database in "database" {
        /// PostgreSQL 15 or later, as `postgres://user:password@host:port/name`. Empty: `DATABASE_URL`; if that is
        /// not set, `POSTGRES_DB_HOST/PORT/NAME/USER/PASSWORD`; if these are not set, the private cluster under
        /// `runtime.dir`.
        url: Secret = "";
        /// How the connection is encrypted, as in libpq: disable, prefer, require, verify-ca or verify-full. Empty:
        /// verify-full, or disable if the host is this machine. A sslmode in the URL wins. PGSSLMODE sets it too.
        sslmode: String = "", Variable("PGSSLMODE"), Is(is_sslmode, SSLMODE_RULE);
        /// A file with the certificates (PEM) of the authorities to trust, such as the bundle that RDS publishes.
        /// Empty: this machine's certificates. A sslrootcert in the URL wins. PGSSLROOTCERT sets it too.
        sslrootcert: PathBuf = "", Variable("PGSSLROOTCERT");
        /// Most connections that a process holds. Each role needs a handful.
        pool_size: usize = 12, Is(is_pool, "use at least 4: the roles need that many connections at once");
        /// How long a start waits for the database, and a role for tables and rights that are missing in it.
        connect_timeout as "connect_timeout_s": Duration = 10;
    }
}

const SSLMODE_RULE: &str =
    "use disable, prefer, require, verify-ca or verify-full; empty: verify-full, or disable for a local host";

fn is_sslmode(value: &Value) -> bool {
    let modes = ["", "disable", "prefer", "require", "verify-ca", "verify-full"];
    value.as_str().is_some_and(|mode| modes.contains(&mode))
}

fn is_pool(value: &Value) -> bool {
    number(value) >= Some(4.0)
}

section! {
    /// `[source]`: the table that is kept in step.
    pub struct Source in "source" {
        /// The source's name in messages and in the tables of schema refarch. Change it only with a fresh schema.
        name: String = "products", Is(fits_as_name, NAME_RULE);
        /// The table to keep in step, optionally with its schema. It is taken literally. If it contains a double
        /// quote, it is read as SQL: `'public."My Notes"'`.
        table: String = "public.products_with_increment";
        /// Its primary key or another column that is unique and never null.
        id: String = "id";
        /// Columns to embed, joined by line breaks. A row whose columns are all null or blank has no vector.
        text: Vec<String> = ["description"], Is(is_not_empty, "name at least one column to embed");
        /// Columns to store beside the vector. A change to any column outside of these lists is ignored.
        metadata: Vec<String> =
            ["id", "created_at", "name", "sku", "description", "price", "last_updated", "uuid"];
    }
}

/// What [`fits_as_name`] asks for.
pub(super) const NAME_RULE: &str = "use 1 to 40 lower-case letters, digits and _, beginning with a letter";

/// Whether a text can be a part of the names of tables and queues.
pub(super) fn fits_as_name(value: &Value) -> bool {
    value.as_str().is_some_and(|name| {
        name.len() <= 40
            && name.starts_with(|c: char| c.is_ascii_lowercase())
            && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
    })
}

fn is_not_empty(value: &Value) -> bool {
    value.as_array().is_none_or(|list| !list.is_empty())
}

section! {
    /// `[runtime]`: the process and its folder.
    pub struct Runtime in "runtime" {
        /// The folder of the private PostgreSQL, the model and their state.
        dir: PathBuf = ".refarch";
        /// Grace period: how long held work may take to finish after a stop signal.
        grace as "grace_s": Duration = 20;
    }
}

section! {
    /// `[admin]`: metrics and readiness of a process.
    pub struct Admin in "admin" {
        /// Address of the admin endpoint (`/metrics`, `/healthz`, `/readyz`), such as 127.0.0.1:9464. Empty: off. Each
        /// process needs a port of its own. Port 0 takes any free one, and the log names it. Who can reach it can
        /// read it, so keep it on loopback or in a private network.
        listen: Option<SocketAddr> = "";
    }
}

section! {
    /// `[log]`
    pub struct Log in "log" {
        /// text or json. Empty: text.
        format: String = "", Is(is_format, "use text or json");
        /// What to log, as in `RUST_LOG`: error, warn, info, debug, trace, or per module.
        level: String = "info";
        /// For Amazon CloudWatch: the name of this deployment. With it, listen writes the fleet's backlog and freshness
        /// to standard output three times a minute, as lines of JSON in the embedded metric format. Empty: never.
        emf: String = "", Is(is_deployment, "use up to 128 letters, digits, - and _");
    }
}

fn is_deployment(value: &Value) -> bool {
    value.as_str().is_some_and(|name| {
        name.len() <= 128 && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'))
    })
}

fn is_format(value: &Value) -> bool {
    matches!(value.as_str(), Some("" | "text" | "json"))
}
