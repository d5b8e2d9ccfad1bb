//! The command line and the configuration, as a person or a script uses them. Wrong input gives an error message that
//! says what is right, and the exit code that `--help` documents.

use std::io::Write;
use std::process::Stdio;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::common::{self, Database, refarch};

/// The output of a run, and its exit code.
#[derive(Debug)]
struct Run {
    code: Option<i32>,
    out: String,
    err: String,
}

async fn run(args: &[&str], env: &[(&str, &str)]) -> Run {
    let mut command = refarch();
    command.args(args).envs(env.iter().copied()).stdin(Stdio::null());
    let output = command.output().await.unwrap();
    Run {
        code: output.status.code(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Runs with standard output directed to `stdout`.
async fn into(stdout: impl Into<Stdio>, args: &[&str]) -> std::process::Output {
    let mut command = refarch();
    command.args(args).stdout(stdout).stderr(Stdio::piped());
    command.spawn().unwrap().wait_with_output().await.unwrap()
}

/// Checks that a run fails because of wrong usage, and that the message says so.
async fn wrong_usage(args: &[&str], says: &str) {
    let run = run(args, &[]).await;
    assert_eq!((run.code, run.out.as_str()), (Some(2), ""), "{run:?}");
    assert!(run.err.contains(says), "{args:?} should say {says:?}: {}", run.err);
}

/// Checks that a run fails, and prints one line on standard error.
async fn failure(args: &[&str], env: &[(&str, &str)], says: &str) {
    let run = run(args, env).await;
    assert_eq!((run.code, run.out.as_str()), (Some(1), ""), "{run:?}");
    assert!(run.err.starts_with("refarch: ") && run.err.contains(says), "{args:?}: {}", run.err);
    assert_eq!(run.err.lines().count(), 1, "{}", run.err);
}

fn file(text: &str) -> (TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mine.toml");
    std::fs::File::create(&path).unwrap().write_all(text.as_bytes()).unwrap();
    let path = path.to_str().unwrap().to_owned();
    (dir, path)
}

#[tokio::test]
async fn wrong_usage_exits_with_2_and_says_how_to_correct_it() {
    wrong_usage(&[], "Usage: refarch [OPTIONS] <COMMAND>").await;
    wrong_usage(&["lsten"], "'listen'").await;
    wrong_usage(&["status", "--jsn"], "'--json'").await;
    for count in ["0", "1025", "-1", "two"] {
        let flag = format!("--workers={count}");
        wrong_usage(&["embed", &flag], "use 1 to 1024 embedding threads").await;
        wrong_usage(&["up", &flag], "use 1 to 1024 embedding threads").await;
    }
    for range in ["4..1", "0..2", "1..", "1..1025"] {
        wrong_usage(&["embed", "--workers", range], "or a range such as 1..4").await;
    }
    wrong_usage(&["up", "--processes", "1..257"], "use 1 to 256 processes").await;
    wrong_usage(&["up", "--processes", "2", "--until-synced"], "cannot be used with").await;
    wrong_usage(&["events", "--since", "soon"], "use an age such as 10m").await;
    wrong_usage(&["generate", "--count=99999999999999999999"], "number too large").await;
    wrong_usage(&["generate", "--load", "--output", "x.csv"], "cannot be used with").await;
    wrong_usage(&["up", "--json"], "--until-synced").await;
    wrong_usage(&["serve", "--bind", "here"], "invalid socket address").await;
    wrong_usage(&["completions", "cmd"], "bash").await;
    wrong_usage(&["redrive", "--id", "1", "--all"], "cannot be used with").await;
    wrong_usage(&["redrive", "--dry-run"], "--id <ID>|--all").await;
}

#[tokio::test]
async fn a_plan_needs_no_database_and_says_what_is_wrong_with_its_numbers() {
    wrong_usage(&["plan"], "--records <COUNT>").await;
    for (flag, says) in [
        ("--records=1.5", "use a count of one or more, such as 1000000"),
        ("--records=1e99", "use at most 1e13"),
        ("--deadline=2", "use a duration with its unit, such as 500ms"),
        ("--workers=5..2", "use a number of workers, or the least and the most, such as 8 or 2..50"),
        ("--worker-rate=0", "use a number above 0"),
        ("--edits-per-second=-1", "use a number, such as 0, 20 or 1k"),
        ("--index=faiss", "possible values: pgvector, pinecone"),
    ] {
        let args = ["plan", flag, "--records=1k"];
        wrong_usage(if flag.starts_with("--records") { &args[..2] } else { &args }, says).await;
    }
    wrong_usage(&["plan", "--records=1k", "--rate-from-status", "--worker-rate=5"], "cannot be used with")
        .await;
    failure(&["plan", "--records=1k", "--region=mars-1"], &[], "has no region mars-1, only us-east-1").await;
    failure(&["plan", "--records=1k", "--prices=/nowhere.toml"], &[], "price file /nowhere.toml").await;

    let dir = tempfile::tempdir().unwrap();
    let chart = dir.path().join("plan.svg");
    let svg = format!("--svg={}", chart.display());
    let flags =
        ["plan", "--records=100k", "--workers=1", "--worker-rate=800", "--startup=0", "--deadline=2m"];
    // A database that cannot be reached is not asked.
    let env = [("DATABASE_URL", "postgres://nobody@127.0.0.1:1/none")];
    let text = run(&[&flags[..], &[&svg]].concat(), &env).await;
    assert_eq!(text.code, Some(0), "{text:?}");
    let checks = "Prices change: check them";
    for says in ["searchable after 2 min 5 s (800 rows/s).", "is missed by 5.0 s", "up to 2", checks] {
        assert!(text.out.contains(says), "{says}: {}", text.out);
    }
    let drawn = std::fs::read_to_string(chart).unwrap();
    assert!(drawn.starts_with("<svg ") && drawn.contains("time since the load began"));
    let json = run(&[&flags[..], &["--json"]].concat(), &env).await;
    let json: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!((json["drained_s"].as_f64(), json["holds"].as_bool()), (Some(125.0), Some(false)));
    assert_eq!(json["remedy"]["workers"], 2);
}

#[tokio::test]
async fn an_unknown_setting_gets_a_suggestion_of_the_nearest_known_one() {
    let (_dir, path) = file("[serve]\nbnid = \"127.0.0.1:1\"\n");
    failure(
        &["--config", &path, "config"],
        &[],
        &format!("{path}: there is no setting serve.bnid; did you mean serve.bind?"),
    )
    .await;
    failure(&["config"], &[("REFARCH_RELAY_POL_MS", "5")], "did you mean relay.poll_ms?").await;
}

#[tokio::test]
async fn an_invalid_value_is_reported_with_its_origin_and_the_valid_values() {
    let (_dir, path) = file("[relay]\npack = 501\n");
    failure(&["--config", &path, "config"], &[], &format!("{path}: relay.pack = 501: use 1 to 500")).await;
    failure(&["config"], &[("REFARCH_RELAY_PACK", "many")], "use a whole number").await;
    failure(&["config", "--log-level", "=x="], &[], "is not a filter such as info").await;
    let (_dir, path) = file("[relay\n");
    let run = run(&["--config", &path, "config"], &[]).await;
    assert_eq!(run.code, Some(1));
    assert!(run.err.starts_with(&format!("refarch: {path} is not valid TOML")), "{}", run.err);
}

#[tokio::test]
async fn a_named_configuration_file_must_exist() {
    let says = "cannot read the configuration file /nowhere/x.toml: No such file";
    failure(&["--config", "/nowhere/x.toml", "config"], &[], says).await;
    failure(&["config"], &[("REFARCH_CONFIG", "/nowhere/x.toml")], says).await;
}

#[tokio::test]
async fn config_prints_the_effective_settings_and_no_secret() {
    let (_dir, path) = file("[relay]\npoll_ms = 7\npack = 70\n");
    let env = [
        ("DATABASE_URL", "postgres://me:hunter2@db/shop"),
        ("REFARCH_SERVE_EDIT_TOKEN", "hunter3"),
        ("REFARCH_RELAY_PACK", "71"),
    ];
    let run = run(&["--config", &path, "--log-format", "json", "config"], &env).await;
    assert_eq!(run.code, Some(0), "{run:?}");
    assert!(!run.out.contains("hunter"), "{}", run.out);
    let table: toml::Table = run.out.parse().unwrap();
    let key = |section: &str, key: &str| table[section][key].clone();
    assert_eq!(key("relay", "poll_ms"), 7.into());
    assert_eq!(key("relay", "pack"), 71.into());
    assert_eq!(key("log", "format"), "json".into());
    assert_eq!(key("database", "url"), "[redacted]".into());
    assert_eq!(key("serve", "edit_token"), "[redacted]".into());
}

/// A text that every secret of the tests below contains.
const MARK: &str = "Mark7hidden";

/// Runs with this file and environment. Checks that no part of a secret is printed.
async fn shows_no_secret(args: &[&str], text: &str, env: &[(&str, &str)]) -> Run {
    let (_dir, path) = file(&text.replace("MARK", MARK));
    let env: Vec<(&str, String)> =
        env.iter().map(|(name, value)| (*name, value.replace("MARK", MARK))).collect();
    let env: Vec<(&str, &str)> = env.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let run = run(&[&["--config", &path], args].concat(), &env).await;
    let said = format!("{}{}", run.out, run.err);
    assert!(!said.contains(MARK) && !said.contains("739517"), "{text:?} {env:?} printed a secret: {said}");
    run
}

#[tokio::test]
async fn a_syntax_error_names_its_position_and_quotes_nothing_of_the_file() {
    for (text, key) in [
        ("[database]\nurl = \"postgres://u:MARK@h/d\n", Some("database.url")),
        ("[database]\nurl = postgres://u:MARK@h/d", Some("database.url")),
        ("[database]\nurl = \"a\" MARK", Some("database.url")),
        ("[index]\n  api_key = \"a\\qMARK\"", Some("index.api_key")),
        ("[index]\napi_key \"MARK\"", None),
        ("[index]\napi_key = 'MARK'\napi_key = 'MARK'", Some("index.api_key")),
        ("[index]\nMARK", None),
        ("[serve]\nedit_token = MARK", Some("serve.edit_token")),
        ("[serve]\nedit_token = '''MARK\nMARK", None),
        ("[index.api_key.MARK]\n\n[index.api_key.MARK]", None),
    ] {
        let run = shows_no_secret(&["config"], text, &[]).await;
        assert_eq!(run.code, Some(1), "{text}: {run:?}");
        assert!(run.err.contains("is not valid TOML") && run.err.contains("line "), "{text}: {}", run.err);
        assert_eq!(run.err.lines().count(), 1, "{}", run.err);
        if let Some(key) = key {
            assert!(run.err.contains(key), "{text}: {}", run.err);
        }
    }
}

#[tokio::test]
async fn a_wrong_value_of_a_secret_or_of_an_address_is_not_printed() {
    for key in ["database.url", "index.api_key", "embedder.api_key", "serve.edit_token"] {
        let (section, name) = key.split_once('.').unwrap();
        for value in ["['MARK']", "{ a = 'MARK' }", "739517", "739517.5"] {
            let run = shows_no_secret(&["config"], &format!("[{section}]\n{name} = {value}"), &[]).await;
            assert!(run.code == Some(1) && run.err.contains(key), "{key} = {value}: {run:?}");
        }
    }
    let addresses = [
        ("queue", "url", "kind = 'sqs'"),
        ("queue", "bulk_url", "kind = 'sqs'\nurl = 'https://h/q'"),
        ("queue", "dead_url", "kind = 'sqs'\nurl = 'https://h/q'"),
        ("index", "controller", "kind = 'pinecone'\nname = 'x'\napi_key = 'x'"),
        ("embedder", "url", "kind = 'tei'"),
    ];
    for (section, name, rest) in addresses {
        for value in ["'ftp://u:MARK@h/q'", "['https://u:MARK@h/q']", "'ftp://h/q?api_key=MARK'"] {
            let text = format!("[{section}]\n{name} = {value}\n{rest}");
            let run = shows_no_secret(&["config"], &text, &[]).await;
            assert!(run.code == Some(1), "{section}.{name} = {value}: {run:?}");
            assert!(run.err.contains(&format!("{section}.{name}")), "{}", run.err);
        }
    }
    // The value of another setting is an address with a password.
    let url = "postgres://u:MARK@h/d";
    for variable in ["REFARCH_DATABASE_POOL_SIZE", "REFARCH_SERVE_BIND", "REFARCH_QUEUE_KIND", "PGSSLMODE"] {
        let run = shows_no_secret(&["config"], "", &[(variable, url)]).await;
        assert!(run.code == Some(1) && run.err.contains("@h/d"), "{variable}: {run:?}");
    }
    // A queue's address must not have credentials.
    let run = shows_no_secret(&["config"], "", &[("SQS_QUEUE_URL", "https://u:MARK@h/1/q")]).await;
    assert!(run.code == Some(1) && run.err.contains("AWS_"), "{run:?}");
    for url in
        ["postgres://u:MARK@h:port/d", "postgres://u:MARK", "host=h password=MARK oops", "MARK=x host=h"]
    {
        let run = shows_no_secret(&["status"], "", &[("DATABASE_URL", url)]).await;
        assert!(run.code == Some(1) && run.err.contains("database.url"), "{url}: {run:?}");
    }
}

#[tokio::test]
async fn addresses_are_shown_without_their_secrets() {
    let keys =
        ["queue.url", "queue.bulk_url", "queue.dead_url", "index.host", "index.controller", "embedder.url"];
    for key in keys {
        let (section, name) = key.split_once('.').unwrap();
        for (url, rest) in [
            ("https://me:MARK@h.example/p?api_key=MARK&x=1&Access-Token=MARK", "h.example/p?"),
            ("https://me:MA/RK@h.example", "h.example"),
            ("https://MARK@h.example", "h.example"),
            ("me:MARK@h.example", "h.example"),
        ] {
            let text = format!("[{section}]\n{name} = '{url}'");
            let shown = shows_no_secret(&["config"], &text, &[]).await;
            assert_eq!(shown.code, Some(0), "{shown:?}");
            assert!(!shown.out.contains("MA/RK"), "{}", shown.out);
            let table: toml::Table = shown.out.parse().unwrap();
            let said = table[section][name].as_str().unwrap();
            assert!(said.contains(rest), "{key}: {said}");
        }
    }
    // No server listens at these addresses. The errors name them.
    let port = common::free_port();
    let database = Database::create().await;
    let env = [("DATABASE_URL", database.url())];
    let env = env.each_ref().map(|(name, value)| (*name, value.as_str()));
    let base = format!("http://me:MARK@127.0.0.1:{port}/?token=MARK");
    // An embedder's address with a user is refused. The error does not show the user.
    let text = format!("[embedder]\nkind = 'tei'\nurl = '{base}'");
    let refused = shows_no_secret(&["migrate"], &text, &env).await;
    assert!(refused.code == Some(1) && refused.err.contains("embedder.url"), "{refused:?}");
    let text = format!("[embedder]\nkind = 'tei'\nurl = 'http://127.0.0.1:{port}/?token=MARK'");
    let tei = shows_no_secret(&["migrate"], &text, &env).await;
    assert!(tei.code == Some(1) && tei.err.contains(&port.to_string()), "{tei:?}");
    let text = format!("[index]\nname = 'x'\nkind = 'pinecone'\napi_key = 'MARK'\ncontroller = '{base}'");
    let pinecone = shows_no_secret(&["migrate"], &text, &env).await;
    assert_eq!(pinecone.code, Some(1), "{pinecone:?}");
    assert!(database.refarch().arg("migrate").output().await.unwrap().status.success());
    let text = "[index]\nkind = 'pinecone'\nname = 'x'\napi_key = 'x'\nhost = 'ftp://u:MARK@h'";
    let host = shows_no_secret(&["status"], text, &env).await;
    assert_eq!(host.code, Some(1), "{host:?}");
}

/// The test's database as a URL with this scheme and these options.
fn url_of(database: &Database, scheme: &str, options: &str) -> String {
    let config: tokio_postgres::Config = database.url().parse().unwrap();
    let [tokio_postgres::config::Host::Unix(dir)] = config.get_hosts() else { panic!("no socket") };
    let (user, port, name) =
        (config.get_user().unwrap(), config.get_ports()[0], config.get_dbname().unwrap());
    let password = String::from_utf8_lossy(config.get_password().unwrap()).into_owned();
    let dir = dir.to_str().unwrap().replace('/', "%2F");
    format!("{scheme}://{user}:{password}@/{name}?host={dir}&port={port}{options}")
}

#[tokio::test]
async fn a_database_url_of_another_tool_works_with_one_warning_about_its_options() {
    let database = Database::create().await;
    assert!(database.refarch().arg("migrate").output().await.unwrap().status.success());
    let cases = [
        ("postgresql", "&schema=public", &[][..]),
        (
            "postgres",
            "&pgbouncer=true&connection_limit=1&pool_timeout=0",
            &["pgbouncer", "connection_limit", "pool_timeout"],
        ),
        (
            "postgresql",
            "&schema=shop&statement_cache_size=100",
            &["schema", "source.table", "statement_cache_size"],
        ),
        (
            "postgresql+asyncpg",
            "&prepared_statement_cache_size=0&command_timeout=60",
            &["prepared_statement_cache_size"],
        ),
        ("postgres+psycopg2", "&connect_timeout=5&application_name=shop&gssencmode=disable", &[]),
        ("jdbc:postgresql", "&prepareThreshold=0&currentSchema=shop", &["prepareThreshold", "currentSchema"]),
        (
            "postgres",
            "&prepared_statements=false&pool=5&reaping_frequency=10",
            &["prepared_statements", "pool"],
        ),
        (
            "postgres",
            "&options=-c%20statement_timeout%3D0&target_session_attrs=primary&channel_binding=prefer",
            &[],
        ),
        ("postgres", "&ssl=false&uselibpqcompat=true&sslmode=", &[]),
        (
            "postgis",
            "&krbsrvname=pg&sslnegotiation=direct&pool_max_conns=4",
            &["krbsrvname", "sslnegotiation"],
        ),
    ];
    for (scheme, options, names) in cases {
        let url = url_of(&database, scheme, options);
        let run = run(&["status"], &[("DATABASE_URL", &url)]).await;
        assert_eq!(run.code, Some(0), "{scheme} {options}: {run:?}");
        assert_eq!(run.err.lines().count(), usize::from(!names.is_empty()), "{options}: {}", run.err);
        for name in names {
            assert!(run.err.contains(name), "{options}: {}", run.err);
        }
    }
    // The address as pairs of key and value, and with quotes that a tool added.
    let pairs = format!("{} connection_limit=1 schema = 'my shop'", database.url());
    let said = run(&["status"], &[("DATABASE_URL", &pairs)]).await;
    assert!(said.code == Some(0) && said.err.contains("connection_limit"), "{said:?}");
    let quoted = format!("\"{}\"\n", url_of(&database, "postgres", ""));
    assert_eq!(run(&["status"], &[("DATABASE_URL", &quoted)]).await.code, Some(0));
}

#[tokio::test]
async fn an_unsupported_option_is_refused_by_name_with_a_remedy() {
    for (options, says) in [
        ("sslmode=no-verify", "sslmode=require"),
        ("sslmode=allow", "use disable, prefer, require, verify-ca or verify-full"),
        ("ssl=no-verify", "sslmode=require"),
        ("sslaccept=accept_invalid_certs", "sslmode=require"),
        ("sslcert=%2Fc.pem&sslkey=%2Fk.pem", "sslcert"),
        ("sslkey=%2Fk.pem", "sslkey"),
        ("sslcrl=%2Fc.crl", "sslcrl"),
        ("requirepeer=postgres", "requirepeer"),
        ("require_auth=scram-sha-256", "require_auth"),
        ("gssencmode=require", "gssencmode"),
        ("ssl_min_protocol_version=TLSv1.3", "ssl_min_protocol_version"),
        ("target_session_attrs=standby", "read-write"),
        ("targetServerType=secondary", "targetServerType"),
        ("service=shop", "service"),
        ("passfile=%2Fp", "password"),
        ("replication=database", "replication"),
        ("sslmod=require", "did you mean sslmode?"),
        ("conect_timeout=3", "did you mean connect_timeout?"),
    ] {
        let url = format!("postgres://me:hunter2@127.0.0.1:9/shop?{options}");
        let run = run(&["status"], &[("DATABASE_URL", &url)]).await;
        assert_eq!(run.code, Some(1), "{options}: {run:?}");
        assert!(run.err.contains("read database.url") && run.err.contains(says), "{options}: {}", run.err);
        assert!(!run.err.contains("hunter2") && !run.err.contains("k.pem"), "{}", run.err);
    }
    let run =
        run(&["status"], &[("DATABASE_URL", "prisma+postgres://accelerate.example/?api_key=hunter2")]).await;
    assert!(run.code == Some(1) && run.err.contains("database itself"), "{run:?}");
    assert!(!run.err.contains("hunter2"), "{}", run.err);
}

#[tokio::test]
async fn help_names_setup_commands_flags_and_exit_codes() {
    let first = run(&["--help"], &[]).await;
    let needs =
        ["refarch setup", "DATABASE_URL", "POSTGRES_DB_HOST", "Exit codes: 0 done, 1 failed, 2 wrong usage"];
    for need in needs {
        assert!(first.out.contains(need), "{need}: {}", first.out);
    }
    let table: &[(&str, &[&str])] = &[
        ("up", &["--products", "--workers", "--bind", "--until-synced"]),
        ("serve", &["--bind", "127.0.0.1:3000"]),
        ("listen", &["--until-idle"]),
        ("embed", &["--workers", "--until-idle"]),
        ("generate", &["--count", "--seed", "--output", "--load", "10000"]),
        ("migrate", &["--json"]),
        ("status", &["--json", "--watch"]),
        ("redrive", &["--id", "--all", "--dry-run", "--json", "refarch redrive --all"]),
        ("config", &[]),
        ("psql", &["[ARGS]..."]),
        ("completions", &["bash", "zsh", "fish"]),
    ];
    for (command, needs) in table {
        assert!(first.out.contains(&format!("\n  {command} ")), "{command}: {}", first.out);
        let help = run(&[command, "--help"], &[]).await;
        assert_eq!(help.code, Some(0));
        for need in needs.iter().chain(&["--config", "--log-format", "--log-level"]) {
            assert!(help.out.contains(need), "{command} {need}: {}", help.out);
        }
    }
    let version = run(&["--version"], &[]).await;
    assert_eq!(version.out, format!("refarch {}\n", env!("CARGO_PKG_VERSION")));
}

#[tokio::test]
async fn completions_know_the_roles() {
    for shell in ["bash", "zsh", "fish"] {
        let run = run(&["completions", shell], &[]).await;
        assert_eq!(run.code, Some(0));
        assert!(run.out.contains("listen") && run.out.contains("until-idle"), "{shell}");
    }
}

#[tokio::test]
async fn a_closed_output_pipe_is_no_failure() {
    for args in [&["config"][..], &["completions", "zsh"], &["--help"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = into(writer, args).await;
        assert_eq!(output.status.code(), Some(0), "{args:?}: {output:?}");
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    }
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_full_disk_is_a_failure() {
    let full = std::fs::File::create("/dev/full").unwrap();
    let output = into(full, &["config"]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("No space left"), "{output:?}");
}

#[tokio::test]
async fn a_database_that_cannot_be_reached_is_named_without_its_password() {
    let port = common::free_port();
    let url = format!("postgres://me:hunter2@127.0.0.1:{port}/shop");
    for command in ["listen", "embed", "migrate", "status", "redrive"] {
        let begun = Instant::now();
        let env = [("DATABASE_URL", url.as_str()), ("REFARCH_DATABASE_CONNECT_TIMEOUT_S", "1")];
        let run = run(&[command], &env).await;
        assert_eq!(run.code, Some(1), "{run:?}");
        assert!(run.err.contains(&format!("127.0.0.1:{port}/shop")), "{}", run.err);
        assert!(run.err.contains("Connection refused"), "{}", run.err);
        assert!(!run.err.contains("hunter2"), "{}", run.err);
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
    failure(&["status"], &[("DATABASE_URL", "the usual one")], "read database.url").await;
}

#[tokio::test]
async fn psql_uses_the_configured_database_and_passes_its_exit_code_on() {
    let database = Database::create().await;
    let mut good = database.refarch();
    // Variables of the environment that name another server must have no effect.
    good.env("PGHOST", "elsewhere").env("PGSERVICE", "other").env("PGHOSTADDR", "192.0.2.1");
    let sql = "SELECT current_database() LIKE 'test%', current_user";
    let output = good.args(["psql", "-XAtc", sql]).output().await.unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "t|refarch\n", "{output:?}");
    let bad = database.refarch().args(["psql", "-Xc", "SELECT 1/0"]).output().await.unwrap();
    assert_eq!(bad.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&bad.stderr).contains("division by zero"), "{bad:?}");
    let mut script = database.refarch();
    script.args(["psql", "-X", "-v", "ON_ERROR_STOP=1", "-f", "-"]).stdin(Stdio::piped());
    let mut script = script.stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = script.stdin.take().unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut stdin, b"SELECT 1/0;\n").await.unwrap();
    drop(stdin);
    assert_eq!(script.wait().await.unwrap().code(), Some(3));
}

#[tokio::test]
async fn a_missing_psql_is_reported() {
    let empty = tempfile::tempdir().unwrap();
    let path = empty.path().to_str().unwrap();
    let env = [("DATABASE_URL", "postgres://me@127.0.0.1/x"), ("PATH", path), ("REFARCH_RUNTIME_DIR", path)];
    failure(&["psql"], &env, "there is no psql: run refarch setup").await;
}

#[tokio::test]
async fn generate_writes_the_whole_csv_file_or_none() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("products.csv");
    let name = path.to_str().unwrap();
    let written = run(&["generate", "--count", "1000", "--output", name], &[]).await;
    assert_eq!((written.code, written.out.as_str()), (Some(0), ""), "{written:?}");
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text.lines().next(), Some("name,sku,description,price,last_updated"));
    assert_eq!(csv::Reader::from_reader(text.as_bytes()).records().map(Result::unwrap).count(), 1000);
    let printed = run(&["generate", "--count", "1000", "--output", "-"], &[]).await;
    assert!(printed.out == text, "the same bytes go to standard output");
    assert_eq!(
        run(&["generate", "--count", "0", "-o", "-"], &[]).await.out,
        "name,sku,description,price,last_updated\n"
    );

    let missing = dir.path().join("no/such/folder.csv");
    failure_after_progress(
        &["generate", "--count", "10", "--output", missing.to_str().unwrap()],
        "no/such/folder.csv",
    )
    .await;
    failure_after_progress(
        &["generate", "--count", "10", "--output", dir.path().to_str().unwrap()],
        "it is a folder",
    )
    .await;
    let left: Vec<_> =
        std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["products.csv"], "nothing half-written is left behind");
}

/// Checks that a run fails, and that its last line has the reason.
async fn failure_after_progress(args: &[&str], says: &str) {
    let run = run(args, &[]).await;
    assert_eq!((run.code, run.out.as_str()), (Some(1), ""), "{run:?}");
    assert!(run.err.lines().last().unwrap().contains(says), "{args:?}: {}", run.err);
}

#[tokio::test]
async fn counts_out_of_range_are_refused() {
    wrong_usage(&["generate", "--count", "99999999999999999999999"], "--count").await;
    wrong_usage(&["generate", "--count", "-1"], "-1").await;
    failure(&["generate", "--count", "9999999999999999"], &[], "9999999999999999").await;
}

#[tokio::test]
async fn generated_products_load_with_the_copy_command_of_the_reference_architecture() {
    let dir = tempfile::tempdir().unwrap();
    let database = Database::create().await;
    assert!(database.refarch().arg("migrate").output().await.unwrap().status.success());
    let generated =
        database.refarch().args(["generate", "--count", "2500"]).current_dir(&dir).output().await.unwrap();
    assert!(generated.status.success());
    let line = r"\copy products_with_increment(name, sku, description, price, last_updated) FROM 'products.csv' WITH (FORMAT csv, HEADER true, DELIMITER ',')";
    let copied = database.refarch().args(["psql", "-c", line]).current_dir(&dir).output().await.unwrap();
    assert_eq!(
        String::from_utf8_lossy(&copied.stdout).trim(),
        "COPY 2500",
        "{}",
        String::from_utf8_lossy(&copied.stderr)
    );
    let loaded = database.refarch().args(["generate", "--count", "2500", "--load"]).output().await.unwrap();
    assert!(loaded.status.success(), "{}", String::from_utf8_lossy(&loaded.stderr));
    let client = database.client().await;
    let sql = "SELECT count(*), count(DISTINCT (name, sku, description, price, last_updated)), \
                      (SELECT sum(cardinality(ids)) FROM refarch.outbox) FROM products_with_increment";
    let row = client.query_one(sql, &[]).await.unwrap();
    let counts: (i64, i64, i64) = (row.get(0), row.get(1), row.get(2));
    assert_eq!(counts, (5000, 2500, 5000), "both ways load the same products, and each row is captured");
}

#[tokio::test]
async fn a_missing_model_is_reported_before_anything_is_started() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().to_str().unwrap();
    for role in [&["up"][..], &["embed"], &["serve", "--bind", "127.0.0.1:0"]] {
        let run =
            run(role, &[("REFARCH_EMBEDDER_MODEL", model), ("REFARCH_SERVE_BIND", "127.0.0.1:0")]).await;
        assert_eq!(run.code, Some(1), "{run:?}");
        assert!(run.err.contains("config.json") && run.err.contains("refarch setup"), "{}", run.err);
    }
}
