//! What happens to each option of a database's address: libpq's options, and options that other tools put
//! into the same address.

/// What happens to an option.
#[derive(Clone, Copy, Debug)]
pub(super) enum OptionPolicy {
    /// tokio-postgres reads it.
    Read,
    /// The mode of encryption.
    Mode,
    /// The file of certificates.
    Root,
    /// tokio-postgres reads it under another name.
    As(&'static str),
    /// An option for another tool's own behaviour: ignored with a warning.
    Ignore,
    /// The same, except for these values, which change nothing and give no warning.
    IgnoreUnless(&'static [&'static str]),
    /// An option that changes which server is trusted or reached, and that is not supported. The text says
    /// what to do instead.
    Refuse(&'static str),
    /// The same, except for these values, which require nothing.
    RefuseUnless(&'static [&'static str], &'static str),
}

use OptionPolicy::{As, Ignore, IgnoreUnless, Mode, Read, Refuse, RefuseUnless, Root};

const CLIENT_CERTIFICATE: &str = "client certificates are not supported: give the role a password";
const REVOCATION: &str =
    "lists of revoked certificates are not read: remove the option, or let a proxy check them";
const VERIFY: &str = "use sslmode=require to encrypt without a check of the server's certificate, or sslmode=verify-full to check it";
const WRITES: &str = "refarch must write: use read-write or any, and the address of the primary server";
const SERVICE: &str = "service files are not read: put host, user and database into the address";

/// The options, by tool.
const OPTIONS: &[(&str, OptionPolicy)] = &[
    // libpq, as tokio-postgres reads it.
    ("user", Read),
    ("password", Read),
    ("dbname", Read),
    ("host", Read),
    ("hostaddr", Read),
    ("port", Read),
    ("options", Read),
    ("application_name", Read),
    ("connect_timeout", Read),
    ("keepalives", Read),
    ("keepalives_idle", Read),
    ("keepalives_interval", Read),
    ("keepalives_retries", Read),
    ("keepalives_count", As("keepalives_retries")),
    ("channel_binding", Read),
    ("load_balance_hosts", Read),
    ("target_session_attrs", RefuseUnless(&["any", "read-write", "primary"], WRITES)),
    // libpq's encryption.
    ("sslmode", Mode),
    ("sslrootcert", Root),
    ("sslnegotiation", IgnoreUnless(&["postgres"])),
    ("sslcompression", IgnoreUnless(&["0"])),
    ("sslsni", IgnoreUnless(&["1"])),
    ("sslcert", Refuse(CLIENT_CERTIFICATE)),
    ("sslkey", Refuse(CLIENT_CERTIFICATE)),
    ("sslpassword", Refuse(CLIENT_CERTIFICATE)),
    ("sslcertmode", RefuseUnless(&["disable", "allow"], CLIENT_CERTIFICATE)),
    ("sslcrl", Refuse(REVOCATION)),
    ("sslcrldir", Refuse(REVOCATION)),
    (
        "ssl_min_protocol_version",
        RefuseUnless(
            &["", "TLSv1", "TLSv1.1", "TLSv1.2"],
            "refarch uses TLS 1.2 and 1.3: require TLS 1.3 at the server",
        ),
    ),
    ("ssl_max_protocol_version", IgnoreUnless(&["", "TLSv1.3"])),
    (
        "gssencmode",
        RefuseUnless(&["disable", "prefer"], "Kerberos is not supported: use sslmode=verify-full"),
    ),
    ("krbsrvname", Ignore),
    ("gsslib", Ignore),
    ("gssdelegation", Ignore),
    ("requirepeer", Refuse("the owner of the server's process is not checked: remove the option")),
    ("require_auth", Refuse("login methods cannot be excluded: use channel_binding=require, or pg_hba.conf")),
    // libpq's other options.
    ("tcp_user_timeout", Ignore),
    ("client_encoding", IgnoreUnless(&["utf8", "UTF8", "utf-8", "UTF-8", "auto"])),
    ("fallback_application_name", Ignore),
    (
        "replication",
        RefuseUnless(
            &["false", "off", "no", "0"],
            "refarch uses no replication connection: remove the option",
        ),
    ),
    ("service", Refuse(SERVICE)),
    ("servicefile", Refuse(SERVICE)),
    ("passfile", Refuse("password files are not read: put the password into the address")),
    // Prisma.
    ("schema", IgnoreUnless(&["", "public"])),
    ("pgbouncer", Ignore),
    ("connection_limit", Ignore),
    ("pool_timeout", Ignore),
    ("socket_timeout", Ignore),
    ("statement_cache_size", Ignore),
    ("sslaccept", Refuse(VERIFY)),
    ("sslidentity", Refuse(CLIENT_CERTIFICATE)),
    // SQLAlchemy, asyncpg, psycopg, Django.
    ("ssl", Mode),
    ("prepared_statement_cache_size", Ignore),
    ("prepared_statement_name_func", Ignore),
    ("max_cached_statement_lifetime", Ignore),
    ("max_cacheable_statement_size", Ignore),
    ("command_timeout", Ignore),
    ("timeout", Ignore),
    ("async_fallback", Ignore),
    ("prepare_threshold", Ignore),
    ("executemany_mode", Ignore),
    ("conn_max_age", Ignore),
    ("CONN_MAX_AGE", Ignore),
    ("conn_health_checks", Ignore),
    ("disable_server_side_cursors", Ignore),
    ("atomic_requests", Ignore),
    // Rails.
    ("pool", Ignore),
    ("prepared_statements", Ignore),
    ("advisory_locks", Ignore),
    ("reaping_frequency", Ignore),
    ("checkout_timeout", Ignore),
    ("idle_timeout", Ignore),
    ("encoding", Ignore),
    ("min_messages", Ignore),
    ("statement_limit", Ignore),
    ("schema_search_path", Ignore),
    ("search_path", Ignore),
    // node-postgres, postgres.js, Sequelize, Vercel's and Supabase's addresses.
    ("uselibpqcompat", IgnoreUnless(&["true", "false"])),
    ("max", Ignore),
    ("min", Ignore),
    ("idleTimeoutMillis", Ignore),
    ("connectionTimeoutMillis", Ignore),
    ("keepAlive", Ignore),
    ("statement_timeout", Ignore),
    ("query_timeout", Ignore),
    ("lock_timeout", Ignore),
    ("idle_in_transaction_session_timeout", Ignore),
    ("prepare", Ignore),
    ("workaround", Ignore),
    ("supa", Ignore),
    ("pool_mode", Ignore),
    // pgx, lib/pq.
    ("pool_max_conns", Ignore),
    ("pool_min_conns", Ignore),
    ("pool_min_idle_conns", Ignore),
    ("pool_max_conn_lifetime", Ignore),
    ("pool_max_conn_lifetime_jitter", Ignore),
    ("pool_max_conn_idle_time", Ignore),
    ("pool_health_check_period", Ignore),
    ("default_query_exec_mode", Ignore),
    ("statement_cache_capacity", Ignore),
    ("description_cache_capacity", Ignore),
    ("binary_parameters", Ignore),
    // Ecto.
    ("pool_size", Ignore),
    ("queue_target", Ignore),
    ("queue_interval", Ignore),
    // sqlx.
    ("ssl-mode", Mode),
    ("ssl-root-cert", Root),
    ("ssl-ca", Root),
    ("ssl-cert", Refuse(CLIENT_CERTIFICATE)),
    ("ssl-key", Refuse(CLIENT_CERTIFICATE)),
    ("statement-cache-capacity", Ignore),
    // JDBC.
    ("currentSchema", IgnoreUnless(&["", "public"])),
    ("ApplicationName", As("application_name")),
    ("prepareThreshold", Ignore),
    ("preparedStatementCacheQueries", Ignore),
    ("preparedStatementCacheSizeMiB", Ignore),
    ("binaryTransfer", Ignore),
    ("reWriteBatchedInserts", Ignore),
    ("stringtype", Ignore),
    ("socketTimeout", Ignore),
    ("loginTimeout", Ignore),
    ("connectTimeout", As("connect_timeout")),
    ("tcpKeepAlive", Ignore),
    ("defaultRowFetchSize", Ignore),
    ("assumeMinServerVersion", Ignore),
    ("autosave", Ignore),
    ("preferQueryMode", Ignore),
    ("loadBalanceHosts", Ignore),
    ("hostRecheckSeconds", Ignore),
    ("targetServerType", RefuseUnless(&["any", "primary", "master"], WRITES)),
    ("sslfactory", Refuse(VERIFY)),
    ("sslhostnameverifier", Refuse(VERIFY)),
];

/// A known name is suggested for an unknown one if they differ by at most this many edits.
const MAX_EDIT_DISTANCE: usize = 2;

/// What happens to an option; `None` if it is unknown.
pub(super) fn policy(name: &str) -> Option<OptionPolicy> {
    OPTIONS.iter().find_map(|(known, policy)| (*known == name).then_some(*policy))
}

/// The known name that is nearest to an unknown one.
pub(super) fn nearest(name: &str) -> Option<&'static str> {
    let distance = |known: &str| strsim::damerau_levenshtein(known, name);
    let (known, _) = OPTIONS.iter().min_by_key(|(known, _)| distance(known))?;
    (name.len() > MAX_EDIT_DISTANCE && distance(known) <= MAX_EDIT_DISTANCE).then_some(*known)
}

/// Whether an ignored option names a schema; refarch has a setting for that.
pub(super) fn names_schema(name: &str) -> bool {
    matches!(name, "schema" | "currentSchema" | "search_path" | "schema_search_path")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_option_stands_in_the_table_once() {
        let mut names: Vec<&str> = OPTIONS.iter().map(|(name, _)| *name).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn what_tokio_postgres_is_given_it_reads() {
        for (name, policy) in OPTIONS {
            let (Read | As(_)) = policy else { continue };
            let name = if let As(other) = policy { other } else { name };
            let value = match *name {
                "hostaddr" => "127.0.0.1",
                "channel_binding" | "load_balance_hosts" => "disable",
                _ => "5",
            };
            assert!(format!("{name}={value}").parse::<tokio_postgres::Config>().is_ok(), "{name}");
        }
    }
}
